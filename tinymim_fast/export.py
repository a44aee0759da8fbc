"""A checkpoint as a model that plain timm loads; and, for where there is no timm, as PyTorch's program or as ONNX.

python -m tinymim_fast.export CHECKPOINT OUT [--formats timm pt2 onnx]
timm.create_model("local-dir:OUT", pretrained=True)
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinymim_fast.checkpoint_flags import CHECKPOINT_FLAGS, add_checkpoint_arguments, checkpoint_arguments
from tinymim_fast.errors import EXIT_INPUT, InputError, flags
from tinymim_fast.files import whole_folder

if TYPE_CHECKING:  # --help does not wait for torch
    from timm.models.vision_transformer import VisionTransformer

    from tinymim_fast.models.model_info import ModelInfo

FORMATS = ("timm", "pt2", "onnx")


def export(
    checkpoint: str,
    out: Path,
    *,
    model: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    key: str | None = None,
    formats: Sequence[str] = ("timm",),
) -> bool:
    """Write `out/model.safetensors` (fp32, timm's names) and `out/config.json` (timm's, with "tinymim_fast" added).

    Both carry the head layout, the recipe and a classifier's class names, so nothing about the model has to be
    remembered; the config has the mean, standard deviation, size and crop of the images that the model expects, and the
    class names as timm's `label_names`. `out` appears whole or not at all.

    Other formats say the same: `out/model.pt2`, of `torch.export`, in its extra file tinymim_fast.json, and
    `out/model.onnx` in its metadata. Both take any number of images, made as the config says, and are held against the
    model before `out` appears.

    Args:
        checkpoint: see `load_encoder`, as `model`, `model_kwargs` and `key`.
        out: folder to make; must not exist, or be empty.
        formats: any of `FORMATS`.

    Returns:
        Whether plain timm loads it. No model of timm's has another number of heads in another block, or TinyMIM*-T's
        layer before the heads; an export that has names `tinymim_fast_vit` or `tinymim_fast_star`, which timm knows
        after `import tinymim_fast.models`, and fails without it.

    Raises:
        InputError: no checkpoint (argument "source"), `out` holds something or can't be written (argument "out"), or
            packages for a format are missing (argument "formats").
    """
    from timm.models import save_for_hf  # here: --help does not wait for torch

    from tinymim_fast.models.checkpoints import TIMM_CONFIG, load_encoder, save_weights
    from tinymim_fast.models.deployment import check_packages
    from tinymim_fast.models.preprocessing import Preprocessing

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists already; choose another folder or remove it", argument="out")
    if "onnx" in formats:
        check_packages()
    vit, info = load_encoder(checkpoint, model=model, model_kwargs=model_kwargs, key=key)
    heads = info.head_layout["num_heads"]
    expects, img_size = info.expects or Preprocessing(), info.model_kwargs["img_size"]
    args = {**info.model_kwargs, "num_heads": heads[0]}
    try:
        with whole_folder(out) as temporary:
            _deploy(temporary, vit, info, formats)
            if "timm" not in formats:
                return True
            save_for_hf(
                vit,
                str(temporary),
                model_config={"tinymim_fast": asdict(info), "label_names": info.class_names},
                model_args=args,
                safe_serialization=True,
                data_config={**asdict(expects), "input_size": (3, img_size, img_size)},
            )
            _correct(temporary / TIMM_CONFIG, info.architecture, heads)
            # the same weights, with the description in the file as well
            save_weights(temporary, vit.state_dict(), info)
    except OSError as error:
        raise InputError(f"{out}: can't be written: {error}", argument="out") from error
    return len(set(heads)) == 1 and info.architecture != "tinymim_fast_star"


def _deploy(folder: Path, vit: VisionTransformer, info: ModelInfo, formats: Sequence[str]) -> None:
    """The formats beside timm's, each checked."""
    from tinymim_fast.models import deployment
    from tinymim_fast.models.preprocessing import Preprocessing

    if not {"pt2", "onnx"} & set(formats):
        return
    img_size = info.model_kwargs["img_size"]
    program = deployment.export_program(vit, img_size)
    said = {**asdict(info), **asdict(info.expects or Preprocessing()), "img_size": img_size}
    writers = {"pt2": (deployment.PROGRAM, deployment.save_program), "onnx": (deployment.ONNX, deployment.save_onnx)}
    for name, write in (writers[form] for form in writers if form in formats):
        write(program, folder / name, said)
        deployment.check_file(folder / name, vit, img_size)


def _correct(path: Path, architecture: str, heads: Sequence[int]) -> None:
    """Make timm's config name the model that has these heads, and not the licence of timm's own weights."""
    config = json.loads(path.read_text())
    for key in ("tag", "license", "origin_url", "paper_ids", "paper_name", "notes"):
        config["pretrained_cfg"].pop(key, None)
    config["architecture"] = architecture
    if len(set(heads)) > 1:
        config["architecture"] = "tinymim_fast_vit"
        config["model_args"] = {**config["model_args"], "base": architecture, "num_heads": list(heads)}
    path.write_text(json.dumps(config, indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tinymim_fast.export", description=__doc__.split("\n")[0])
    add_checkpoint_arguments(parser)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument(
        "--formats", nargs="+", choices=FORMATS, default=["timm"], help="timm's folder, torch.export's file, ONNX"
    )
    args = parser.parse_args(argv)
    logging.basicConfig(format="export: %(message)s", level=logging.WARNING)
    try:
        with flags(**CHECKPOINT_FLAGS, out="OUT", formats="--formats"):
            plain = export(args.checkpoint, args.out, **checkpoint_arguments(args), formats=args.formats)
    except InputError as error:
        print(f"export: {error}", file=sys.stderr)
        return EXIT_INPUT
    print(f"{args.out}: {', '.join(sorted(path.name for path in args.out.iterdir()))}")
    if "timm" in args.formats:
        print(f"timm.create_model('local-dir:{args.out}', pretrained=True)")
    if not plain:
        print(
            "Its blocks have different numbers of heads, or a layer stands before its classifier, which plain timm "
            "can't have: `import tinymim_fast.models` first. With one number of heads its features are others."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
