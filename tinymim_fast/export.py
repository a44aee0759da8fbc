"""A checkpoint as a model that plain timm loads.

python -m tinymim_fast.export CHECKPOINT OUT
timm.create_model("local-dir:OUT", pretrained=True)
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from timm.models import save_for_hf

from tinymim_fast.config import IMAGENET_MEAN, IMAGENET_STD
from tinymim_fast.errors import EXIT_INPUT, InputError, flags
from tinymim_fast.models.checkpoints import load_encoder, save_weights


def export(checkpoint: str, out: Path) -> None:
    """Write `out/model.safetensors` (fp32, timm's names) and `out/config.json` (timm's, with "tinymim_fast" added).

    Both carry the head layout and the recipe, so nothing about the model has to be remembered. `out` appears whole or not
    at all.

    Args:
        checkpoint: a run's output folder (its newest checkpoint), one of its checkpoints, or a teacher file.
        out: folder to make; must not exist, or be empty.

    Raises:
        InputError: no checkpoint, or `out` holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"OUT {out}: exists already; choose another folder or remove it")
    vit, info = load_encoder(checkpoint)
    recipe = info.recipe
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_for_hf(
            vit,
            str(temporary),
            model_config={"tinymim_fast": asdict(info)},
            model_args=info.model_kwargs,
            safe_serialization=True,
            data_config={
                "input_size": (3, info.model_kwargs["img_size"], info.model_kwargs["img_size"]),
                "mean": tuple(recipe.get("mean", IMAGENET_MEAN)),
                "std": tuple(recipe.get("std", IMAGENET_STD)),
                "interpolation": "bicubic",
            },
        )
        save_weights(temporary, vit.state_dict(), info)  # the same weights, with the description in the file as well
        if out.exists():
            out.rmdir()
        os.rename(temporary, out)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(f"OUT {out}: can't be written: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tinymim_fast.export", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="a run's output folder, or one of its checkpoints")
    parser.add_argument("out", type=Path, help="folder to make")
    args = parser.parse_args(argv)
    try:
        with flags(source="CHECKPOINT", model="CHECKPOINT"):
            export(args.checkpoint, args.out)
    except InputError as error:
        print(f"export: {error}", file=sys.stderr)
        return EXIT_INPUT
    print(f"{args.out}: timm.create_model('local-dir:{args.out}', pretrained=True)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
