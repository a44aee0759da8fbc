"""Checkpoint formats in and out.

A checkpoint of this package is a folder with `model.safetensors`: fp32 weights in timm's names, and a JSON description
in the file's metadata under "tinymim_fast" (`ModelInfo`). Training adds optimizer state beside it; an export adds timm's
`config.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer

from tinymim_fast.errors import InputError
from tinymim_fast.models.vit import create_vit, head_layout

WEIGHTS = "model.safetensors"
STEP_NAME = re.compile(r"step_\d{8}")
METADATA_KEY = "tinymim_fast"
SIZES = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large", (1280, 32): "huge"}
# Weights that other formats have or lack, and that neither a teacher nor a student's tap reads.
NOT_NEEDED = ("norm.", "fc_norm.", "head.", "head_dist.")
NOT_ENCODER = ("decoder_", "mask_token", *NOT_NEEDED)


@dataclass(frozen=True)
class ModelInfo:
    """What a weights file holds.

    Args:
        architecture: timm name.
        model_kwargs: for `timm.create_model`, `img_size` included.
        kind: "tinymim" (distilled) or "mae".
        head_layout: width and heads of each block; for distilled students also `relation_heads`.
        recipe: the run's resolved configuration.
        step: optimizer steps taken.
        epoch: epochs, as a fraction.
    """

    architecture: str
    model_kwargs: dict[str, Any]
    kind: str
    head_layout: dict[str, Any]
    recipe: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    epoch: float = 0.0


def save_weights(folder: Path, state: Mapping[str, torch.Tensor], info: ModelInfo) -> None:
    """`folder/model.safetensors`, synced to disk."""
    path = folder / WEIGHTS
    tensors = {k: v.detach().to("cpu").contiguous() for k, v in state.items()}
    safetensors.torch.save_file(tensors, path, {"format": "pt", METADATA_KEY: json.dumps(asdict(info))})
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run that hold weights, oldest first.

    Those are folders named `step_` and eight digits with `model.safetensors`; a user's copies, unfinished ones and whatever else
    lies there are none.
    """
    folders = (p for p in (output_dir / "checkpoints").glob("step_*") if STEP_NAME.fullmatch(p.name))
    return sorted(p for p in folders if (p / WEIGHTS).is_file())


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, None where there is none."""
    return next(reversed(list_checkpoints(output_dir)), None)


def read_weights(source: Path) -> tuple[dict[str, torch.Tensor], ModelInfo | None]:
    """Weights and, in this package's own files, their description.

    Args:
        source: a run's output folder (its newest checkpoint), a checkpoint or export folder, a `.safetensors` file, or a
            PyTorch pickle with the weights at top level or under "model" or "state_dict".

    Raises:
        InputError: missing, or not a checkpoint.
    """
    path = source
    if (path / "checkpoints").is_dir():
        path = latest_checkpoint(path) or path
    if path.is_dir():
        path = path / WEIGHTS
    if not path.is_file():
        raise InputError(
            f"{source}: no such checkpoint; want a .pth or .safetensors file, or a folder with {WEIGHTS}",
            argument="source",
        )
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                described = (file.metadata() or {}).get(METADATA_KEY)
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return state, ModelInfo(**json.loads(described)) if described else None
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        safetensors.SafetensorError,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
    ) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"{source}: not a checkpoint that can be read: {reason}", argument="source") from error
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not any(isinstance(v, torch.Tensor) for v in content.values()):
        raise InputError(
            f"{source}: holds no weights; want a state dict, at top level or under 'model'", argument="source"
        )
    return {k.removeprefix("module."): v for k, v in content.items() if isinstance(v, torch.Tensor)}, None


def load_encoder(
    source: str,
    *,
    model: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    img_size: int | None = None,
) -> tuple[VisionTransformer, ModelInfo]:
    """A whole encoder with its weights, fp32 on the CPU, and what it is.

    Args:
        source: a path (see `read_weights`: MAE and TinyMIM releases, this package's checkpoints and exports), or
            `timm:NAME`, for timm's own weights.
        model: timm name; needed only where neither the file nor its widths tell.
        model_kwargs: for `timm.create_model`; they override the file's.
        img_size: side of the square input, pixels; absolute position embeddings are resampled to it. Default: the file's.

    Raises:
        InputError: unreadable, or weights of another architecture; names the first key that differs and both shapes.
    """
    kwargs = dict(model_kwargs or {})
    if source.startswith("timm:"):
        name = source.removeprefix("timm:")
        if model is not None and model != name:
            raise InputError(f"got {model}, but the checkpoint is {source}; leave it out", argument="model")
        if not name.startswith("local-dir:") and not timm.is_model(name):
            raise InputError(f"{source}: timm has no model of this name", argument="source")
        try:
            vit = create_vit(name, img_size=img_size or 224, pretrained=True, **kwargs)
        except OSError as error:
            raise InputError(
                f"{source}: its weights can't be fetched ({error}); give a local file", argument="source"
            ) from error
        info = ModelInfo(name, {**kwargs, "img_size": img_size or 224}, "timm", head_layout(vit))
        return vit, info

    state, info = read_weights(Path(source))
    if info is not None:
        if model is not None and model != info.architecture:
            raise InputError(f"got {model}, but {source} holds a {info.architecture}; leave it out", argument="model")
        name, kwargs = info.architecture, {**info.model_kwargs, **kwargs}
    else:
        name = model or _guess_architecture(state, source)
    kwargs["img_size"] = img_size or kwargs.get("img_size", 224)
    vit = create_vit(name, **kwargs)
    load_state(vit, state, source=source, name=name)
    found = info or ModelInfo(name, kwargs, "mae", head_layout(vit))
    return vit, ModelInfo(**{**asdict(found), "architecture": name, "model_kwargs": kwargs})


def load_state(vit: VisionTransformer, state: Mapping[str, torch.Tensor], *, source: str, name: str) -> None:
    """Fill `vit`; decoder, classifier and final norm may be missing or in excess, all else must match.

    Raises:
        InputError: names the first key that differs and both shapes.
    """
    wanted = vit.state_dict()
    state = {k: v for k, v in state.items() if k in wanted or not k.startswith(NOT_ENCODER)}
    embed = state.get("pos_embed")
    if embed is not None and "pos_embed" in wanted and embed.shape != wanted["pos_embed"].shape:
        state["pos_embed"] = _resample(embed, vit)
    for key, tensor in wanted.items():
        if key not in state and not key.startswith(NOT_NEEDED):
            raise InputError(f"{source}: not a {name}: it lacks {key}, {tuple(tensor.shape)}", argument="source")
        if key in state and state[key].shape != tensor.shape:
            raise InputError(
                f"{source}: not a {name}: {key} is {tuple(state[key].shape)} in the file, {tuple(tensor.shape)} in the model",
                argument="source",
            )
    for key, tensor in state.items():
        if key not in wanted:
            raise InputError(
                f"{source}: not a {name}: it has {key}, {tuple(tensor.shape)}, and the model has none",
                argument="source",
            )
    vit.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)


def _resample(embed: torch.Tensor, vit: VisionTransformer) -> torch.Tensor:
    """Absolute position embeddings for another image size; unchanged where the shapes can't be that."""
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    side = (embed.shape[1] - prefix) ** 0.5 if embed.ndim == 3 else 0.5
    if side != int(side) or embed.shape[-1] != vit.embed_dim:
        return embed
    return resample_abs_pos_embed(embed.float(), new_size=vit.patch_embed.grid_size, num_prefix_tokens=prefix)


def _guess_architecture(state: Mapping[str, torch.Tensor], source: str) -> str:
    """timm name from the widths of a state dict that does not say what it is."""
    proj = state.get("patch_embed.proj.weight")
    if proj is None or proj.ndim != 4:
        first = next(iter(state))
        raise InputError(
            f"{source}: not a vision transformer: no patch_embed.proj.weight, the first key is {first}",
            argument="source",
        )
    width, patch = proj.shape[0], proj.shape[-1]
    depth = len({k.split(".")[1] for k in state if k.startswith("blocks.")})
    name = f"vit_{SIZES.get((width, depth))}_patch{patch}_224"
    if not timm.is_model(name):
        raise InputError(
            f"{source} holds {depth} blocks of width {width}, patch {patch}, which no timm name tells; say what it is",
            argument="model",
        )
    return name
