"""Checkpoint formats in and out.

A checkpoint of this package is a folder with `model.safetensors`: fp32 weights in timm's names, and a JSON description
in the file's metadata under "tinymim_fast" (`ModelInfo`). Training adds optimizer state beside it, and, where it
averages its weights, the average as `model_ema.safetensors`, which is what whoever reads the folder gets; an export
adds timm's `config.json`. What other files hold: weights_file.py, official.py.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer

from tinymim_fast.errors import InputError
from tinymim_fast.models.architecture import check_kwargs, check_name, shown
from tinymim_fast.models.model_info import ModelInfo, of_file
from tinymim_fast.models.official import classifier_kwargs, published, refuse_star
from tinymim_fast.models.preprocessing import Preprocessing
from tinymim_fast.models.vit import check_heads, create_vit, head_layout
from tinymim_fast.models.weights_file import FileContent, check_finite, find_encoder, read_file, read_json

logger = logging.getLogger("tinymim_fast")
WEIGHTS = "model.safetensors"
EMA_WEIGHTS = "model_ema.safetensors"
TIMM_CONFIG = "config.json"
STEP_NAME = re.compile(r"step_\d{8}")
METADATA_KEY = "tinymim_fast"
SIZES = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large", (1280, 32): "huge"}
# Weights that other formats have or lack, and that no tap before the final norm reads.
NOT_NEEDED = ("norm.", "fc_norm.", "pre_head.", "head.", "head_dist.")
TARGETS = "targets."  # before layers that distillation trains beside a student, which go no further
NOT_ENCODER = ("decoder_", "mask_token", TARGETS, *NOT_NEEDED)


def save_weights(folder: Path, state: Mapping[str, torch.Tensor], info: ModelInfo, name: str = WEIGHTS) -> None:
    """`folder/name`, for `files.whole_folder` to sync."""
    path = folder / name
    tensors = {k: v.detach().to("cpu").contiguous() for k, v in state.items()}
    safetensors.torch.save_file(tensors, path, {"format": "pt", METADATA_KEY: json.dumps(asdict(info))})


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run that hold weights, oldest first.

    Those are folders named `step_` and eight digits with `model.safetensors`; a user's copies, unfinished ones and
    whatever else lies there are none.
    """
    folders = (p for p in (output_dir / "checkpoints").glob("step_*") if STEP_NAME.fullmatch(p.name))
    return sorted(p for p in folders if (p / WEIGHTS).is_file())


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, None where there is none."""
    return next(reversed(list_checkpoints(output_dir)), None)


def find_weights(source: Path) -> Path:
    """The file with the weights.

    Args:
        source: a run's output folder (its newest checkpoint), a checkpoint or export folder, a timm model folder, or a
            file. Of a folder with an average of the weights (EMA) it is that one.

    Raises:
        InputError: there is none, argument "source".
    """
    path = source
    if (path / "checkpoints").is_dir():
        path = latest_checkpoint(path) or path
    if path.is_dir():
        names = (EMA_WEIGHTS, WEIGHTS, "pytorch_model.bin")
        path = next((path / name for name in names if (path / name).is_file()), path / WEIGHTS)
    if not path.is_file():
        held = f"; this folder holds {_listed(source)}" if source.is_dir() else ""
        raise InputError(
            f"{source}: no such checkpoint; want a .pth or .safetensors file, or a folder with {WEIGHTS}{held}",
            argument="source",
        )
    return path


def read_weights(source: Path) -> tuple[dict[str, torch.Tensor], ModelInfo | None]:
    """Weights as they are named in the file and, in this package's own files, their description.

    Args:
        source: see `find_weights`.

    Raises:
        InputError: missing, or not a checkpoint, argument "source".
    """
    path = find_weights(source)
    content = read_file(path)
    return content.tensors, _described(content, path)


def describe(source: Path) -> ModelInfo | None:
    """What `read_weights` gives, without the weights.

    Raises:
        InputError: see `read_weights`.
    """
    path = find_weights(source)
    try:
        with safetensors.safe_open(path, framework="np") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
    except (OSError, safetensors.SafetensorError):
        return read_weights(path)[1]  # which says what is wrong, or reads another format
    return None if text is None else ModelInfo.from_json(text, path)


def load_encoder(
    source: str,
    *,
    model: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    img_size: int | None = None,
    key: str | None = None,
    classifier: bool = False,
) -> tuple[VisionTransformer, ModelInfo]:
    """A whole encoder with its weights, fp32 on the CPU, and what it is.

    Args:
        source: a path (see `find_weights`: MAE and TinyMIM releases, what other trainers write, this package's
            checkpoints and exports, timm's model folders), or `timm:NAME`, for timm's own weights.
        model: timm name; needed only where neither the file nor its widths tell.
        model_kwargs: for `create_vit`; they override the file's, but not its numbers of heads.
        img_size: side of the square input, pixels; absolute position embeddings are resampled to it. Default: the
            file's.
        key: of several models in one file, the one below this key; of several students of one run, the one of this
            name.
        classifier: whether final norm and head must be there too; see `classifier.load_classifier`.

    Raises:
        InputError: unreadable, weights of another architecture (names the first key that differs and both shapes),
            other numbers of heads than the file's (names the block and both), or weights that are not finite.
    """
    asked = check_kwargs(model_kwargs or {})
    local = source.removeprefix("timm:local-dir:")
    if source.startswith("timm:") and local == source:
        return _load_timm(source, model=model, kwargs=asked, img_size=img_size)
    path = find_weights(Path(local))
    content = read_file(path)
    info = _described(content, path) or _timm_folder(path.parent)
    if info is not None and info.students:
        info, state = info.of_student(key, path), _of_student(content.tensors, key)
    else:
        state = content.tensors if info is not None and key is None else find_encoder(content, path, key)
    if info is None:
        refuse_star(state, path)
        info = _told_by_file(content, state, path, model)
    elif model is not None and model != info.architecture:
        raise InputError(f"got {model}, but {source} holds a {info.architecture}; leave it out", argument="model")
    kwargs = {**info.model_kwargs, **asked}
    kwargs["img_size"] = img_size or kwargs.get("img_size") or 224
    state = {k: v for k, v in state.items() if not k.startswith(("decoder_", "mask_token", TARGETS))}
    with torch.device("meta"):  # shapes are compared before anything as large as the file claims is made
        if model is None and not asked:
            shape_of = of_file(path, "its model", lambda kwargs: create_vit(info.architecture, **kwargs), kwargs)
        else:
            shape_of = create_vit(info.architecture, **kwargs)
    check_heads(shape_of, info.head_layout.get("num_heads", []), source)
    resized = img_size is not None or "img_size" in asked
    _fit(shape_of, state, source=source, name=info.architecture, resize=resized, classifier=classifier)
    check_finite(state, path)
    vit = create_vit(info.architecture, **kwargs)
    load_state(vit, state, source=source, name=info.architecture)
    layout = {**head_layout(vit), **{k: v for k, v in info.head_layout.items() if k not in ("embed_dim", "num_heads")}}
    if not info.head_layout:
        heads = ", ".join(map(str, dict.fromkeys(layout["num_heads"])))
        given = "as model_kwargs says" if "num_heads" in asked else f"as in timm's {info.architecture}"
        logger.warning("%s says nothing of its attention heads; assumed: %s a block, %s", source, heads, given)
    return vit, replace(info, model_kwargs=kwargs, head_layout=layout)


def restore(vit: VisionTransformer, checkpoint: Path, *, student: str | None = None) -> dict[str, torch.Tensor]:
    """Fill a model with the weights of its own run; gives what lies beside it, its targets' layers by name.

    Args:
        vit: built as the run's configuration says.
        checkpoint: a folder that the run saved.
        student: which of several.

    Raises:
        InputError: unreadable, not finite, or of another model (argument "source"); other numbers of heads (argument
            "model_kwargs").
    """
    state, info = read_weights(checkpoint / WEIGHTS)
    if student is not None:
        state = _of_student(state, student)
        info = info and info.of_student(student, checkpoint)
    check_finite(state, checkpoint)
    if info is not None:
        check_heads(vit, info.head_layout.get("num_heads", []), checkpoint)
    load_state(vit, state, source=str(checkpoint), name=info.architecture if info else type(vit).__name__)
    return {name.removeprefix(TARGETS): tensor for name, tensor in state.items() if name.startswith(TARGETS)}


def _of_student(state: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """One student's weights of a file that holds several."""
    prefix = f"student.{name.removeprefix('student.')}."
    return {k.removeprefix(prefix): tensor for k, tensor in state.items() if k.startswith(prefix)}


def load_state(vit: VisionTransformer, state: Mapping[str, torch.Tensor], *, source: str, name: str) -> None:
    """Fill `vit`; decoder, classifier and final norm may be missing or in excess, all else must match.

    Raises:
        InputError: names the first key that differs and both shapes, argument "source".
    """
    fitting = _fit(vit, state, source=source, name=name)
    vit.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in fitting.items()}, strict=False)


def _fit(
    vit: VisionTransformer,
    state: Mapping[str, torch.Tensor],
    *,
    source: str,
    name: str,
    resize: bool = True,
    classifier: bool = False,
) -> dict[str, torch.Tensor]:
    """What of `state` goes into `vit`, position embeddings resampled with `resize`; raises where it doesn't fit."""

    def refused(why: str) -> InputError:
        return InputError(f"{source}: not a {name}: {why}", argument="source")

    wanted = vit.state_dict()
    state = {k: v for k, v in state.items() if k in wanted or not k.startswith(NOT_ENCODER)}
    embed = state.get("pos_embed")
    if resize and embed is not None and "pos_embed" in wanted and embed.shape != wanted["pos_embed"].shape:
        state["pos_embed"] = _resample(embed, vit)
    for key, tensor in wanted.items():
        if key not in state and (classifier or not key.startswith(NOT_NEEDED)):
            raise refused(f"it lacks {key}, {tuple(tensor.shape)}")
        if key in state and state[key].shape != tensor.shape:
            raise refused(f"{key} is {tuple(state[key].shape)} in the file, {tuple(tensor.shape)} in the model")
    for key, tensor in state.items():
        if key not in wanted:
            raise refused(f"it has {shown(key).strip(chr(39))}, {tuple(tensor.shape)}, and the model has none")
    return state


def _resample(embed: torch.Tensor, vit: VisionTransformer) -> torch.Tensor:
    """Absolute position embeddings for another image size; unchanged where the shapes can't be that."""
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    side = max(embed.shape[1] - prefix, 0) ** 0.5 if embed.ndim == 3 else 0.5
    if side != int(side) or side < 1 or embed.shape[-1] != vit.embed_dim:
        return embed
    return resample_abs_pos_embed(embed.float(), new_size=vit.patch_embed.grid_size, num_prefix_tokens=prefix)


def _described(content: FileContent, path: Path) -> ModelInfo | None:
    """What a file of this package says of itself."""
    text = content.metadata.get(METADATA_KEY)
    return None if text is None else ModelInfo.from_json(text, path)


def _load_timm(
    source: str, *, model: str | None, kwargs: dict[str, Any], img_size: int | None
) -> tuple[VisionTransformer, ModelInfo]:
    name = source.removeprefix("timm:")
    if model is not None and model != name:
        raise InputError(f"got {model}, but the checkpoint is {source}; leave it out", argument="model")
    check_name(name, "source")
    config = timm.get_pretrained_cfg(name)
    config = {} if config is None else config.to_dict()
    kwargs = {**kwargs, "img_size": img_size or kwargs.get("img_size") or config.get("input_size", (3, 224))[-1]}
    try:
        vit = create_vit(name, pretrained=True, **kwargs)
    except OSError as error:
        raise InputError(
            f"{source}: its weights can't be fetched ({error}); give a local file", argument="source"
        ) from error
    check_finite(vit.state_dict(), source)
    with torch.device("meta"):
        plain = create_vit(name, img_size=kwargs["img_size"])
    check_heads(vit, head_layout(plain)["num_heads"], source)
    expects = Preprocessing.from_config(config, source)
    return vit, ModelInfo(name, kwargs, "timm", head_layout(vit), preprocessing=expects and asdict(expects))


def _timm_folder(folder: Path) -> ModelInfo | None:
    """What timm's config.json beside the weights says; None where there is none of timm's."""
    path = folder / TIMM_CONFIG
    if not path.is_file():
        return None
    config = read_json(path)
    if not isinstance(config, dict) or "architecture" not in config:
        return None
    if METADATA_KEY in config:
        return ModelInfo.from_dict(config[METADATA_KEY], path)
    cfg = config.get("pretrained_cfg")
    cfg = cfg if isinstance(cfg, dict) else {}
    args = config.get("model_args") or {}
    args = {"num_classes": config.get("num_classes", 0), **(args if isinstance(args, dict) else {"model_args": args})}
    name = of_file(path, "architecture", check_name, config["architecture"])
    size = {"img_size": args.pop("img_size", cfg.get("input_size") or 224)}
    kwargs = of_file(path, "model_args", check_kwargs, {**args, "img_size": _square(size["img_size"], path)})
    expects = Preprocessing.from_config(cfg, path)
    with torch.device("meta"):
        layout = head_layout(create_vit(name, **kwargs))
    return ModelInfo(name, kwargs, "timm", layout, preprocessing=expects and asdict(expects))


def _square(size: Any, path: object) -> Any:
    """A side, from a side, (height, width) or (channels, height, width)."""
    if isinstance(size, (list, tuple)) and size:
        if len(set(map(str, size[-2:]))) > 1:
            raise InputError(f"{path}: images of {shown(str(size))} pixels; want square ones", argument="source")
        return size[-1]
    return size


def _told_by_file(content: FileContent, state: Mapping[str, torch.Tensor], path: Path, model: str | None) -> ModelInfo:
    """What the arguments and the shapes in a file of others tell."""
    told = published(content.args, state)
    if told is not None and model is not None and model.split(".")[0] != told.architecture:
        raise InputError(f"got {model}, but {path} holds a {told.architecture}; leave it out", argument="model")
    name = model or (told.architecture if told else _guess_architecture(state, path))
    kwargs = {**classifier_kwargs(state, path), **(told.model_kwargs if told else {})}
    size = _img_size(state)
    if size:
        kwargs["img_size"] = size
    if told is None:
        return ModelInfo(name, kwargs, "foreign", {})
    with torch.device("meta"):
        layout = head_layout(create_vit(name, **{"img_size": 224, **kwargs}))
    if told.relation_heads:
        layout["relation_heads"] = told.relation_heads
    logger.info("%s: %s, a %s model with %s heads", path, told.architecture, told.kind, _runs(layout["num_heads"]))
    return ModelInfo(name, kwargs, told.kind, layout)


def _runs(numbers: Sequence[int]) -> str:
    """[6, 6, 12] as "6, 6, 12", and [6, 6, 6] as "6"."""
    return str(numbers[0]) if len(set(numbers)) == 1 else ", ".join(map(str, numbers))


def _img_size(state: Mapping[str, torch.Tensor]) -> int | None:
    """Side of the input, from a square of position embeddings behind a class token; None where there is none."""
    embed, proj = state.get("pos_embed"), state.get("patch_embed.proj.weight")
    if embed is None or embed.ndim != 3 or proj is None or proj.ndim != 4 or "cls_token" not in state:
        return None
    side = max(embed.shape[1] - 1, 0) ** 0.5
    return int(side) * proj.shape[-1] or None if side == int(side) else None


def _guess_architecture(state: Mapping[str, torch.Tensor], path: Path) -> str:
    """timm name from the widths of a state dict that does not say what it is."""
    proj = state["patch_embed.proj.weight"]
    if proj.ndim != 4:
        raise InputError(
            f"{path}: not timm's layout: patch_embed.proj.weight is {tuple(proj.shape)}, want four dimensions",
            argument="source",
        )
    width, patch = proj.shape[0], proj.shape[-1]
    depth = len({k.split(".")[1] for k in state if k.startswith("blocks.")})
    family = "deit_{}_distilled" if "dist_token" in state else "vit_{}"
    name = f"{family.format(SIZES.get((width, depth)))}_patch{patch}_224"
    if not timm.is_model(name):
        raise InputError(
            f"{path} holds {depth} blocks of width {width}, patch {patch}, which no timm name tells; say what it is",
            argument="model",
        )
    return name


def _listed(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(shown(name).strip("'") for name in names[:5]) or "nothing") + more
