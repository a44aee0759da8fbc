"""What a continued run may find: its checkpoint, its configuration, its images, its bad files."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from tinymim_fast.config import RunConfig, differences
from tinymim_fast.data import ImageIndex, find_images
from tinymim_fast.data.bad_files import BadFiles
from tinymim_fast.errors import InputError
from tinymim_fast.models.checkpoints import METADATA_KEY, WEIGHTS, latest_checkpoint, list_checkpoints
from tinymim_fast.training.checkpoint import damage
from tinymim_fast.yaml_files import read_mapping

logger = logging.getLogger("tinymim_fast")
CONFIG = "config.yaml"
INDEX = "index.npz"


@dataclass(frozen=True)
class Found:
    """The checkpoint to go on from, None for a new run, and the newer ones that are damaged, to be set aside."""

    checkpoint: Path | None
    damaged: tuple[Path, ...] = ()


def find_checkpoint(config: RunConfig) -> Found:
    """The newest checkpoint that is not damaged.

    Raises:
        InputError: the folder holds another run, or damaged checkpoints alone, or `resume` is "none" and it holds any.
    """
    output_dir = Path(config.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"{output_dir} is a file, want a folder", argument="output_dir")
    candidates = list_checkpoints(output_dir)
    latest = candidates[-1] if candidates else None
    if config.resume == "none":
        if latest is not None:
            raise InputError(
                f'{output_dir} holds {latest.name}; resume "none" wants a folder without checkpoints',
                argument="output_dir",
            )
        return Found(None)
    changed = changes(config)
    if changed:
        raise InputError(
            f"{output_dir} holds a run with another configuration ({'; '.join(changed)}); "
            "choose another folder, or the same configuration to continue it",
            argument="output_dir",
        )
    return _newest_good(candidates, verify=config.verify_checkpoints)


def changes(config: RunConfig) -> list[str]:
    """What makes the run in `output_dir` another one than `config`, see `differences`; nothing where there is none.

    Raises:
        InputError: there is one, and nothing says of which configuration.
    """
    output_dir = Path(config.output_dir)
    saved = _saved_configuration(output_dir / CONFIG, latest_checkpoint(output_dir))
    return [] if saved is None else differences(saved, config)


def _saved_configuration(path: Path, latest: Path | None) -> dict[str, Any] | None:
    """What config.yaml says; where it says nothing, what the newest checkpoint does; None for a new run."""
    said = "is missing"
    if path.exists():
        try:
            saved = read_mapping(path)
            if "output_dir" in saved:
                return saved
            said = "holds no configuration"
        except (OSError, InputError) as error:
            said = f"can't be read ({' '.join(str(error).split())[:100]})"
    if latest is None:
        return None
    try:
        with safetensors.safe_open(latest / WEIGHTS, framework="np") as file:
            recipe = json.loads(file.metadata()[METADATA_KEY])["recipe"]
        if not isinstance(recipe, dict) or "output_dir" not in recipe:
            raise ValueError("no recipe")
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError):
        raise InputError(
            f"{path} {said}, and {latest.name} doesn't hold the configuration either; choose another folder",
            argument="output_dir",
        ) from None
    logger.warning("%s %s; it is written anew, from what %s holds of it", path, said, latest.name)
    return recipe


def _newest_good(candidates: list[Path], *, verify: bool) -> Found:
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(candidates):
        why = damage(checkpoint, verify=verify)
        if why is None:
            for path, reason in damaged.items():
                logger.warning("%s is damaged, %s; going on from %s instead", path, reason, checkpoint.name)
            return Found(checkpoint, tuple(damaged))
        damaged[checkpoint] = why
    if damaged:
        raise InputError(
            f"every checkpoint is damaged: {'; '.join(f'{path} ({why})' for path, why in damaged.items())}. "
            "Restore one, or choose another folder to start anew",
            argument="output_dir",
        )
    return Found(None)


def check_kept(now: dict[str, dict[str, Any]], began: dict[str, dict[str, Any]] | None) -> None:
    """Refuse to go on with another file than the run began with, as a teacher.

    Args:
        now: `Task.kept`.
        began: the checkpoint's; None in those of before there was one.

    Raises:
        InputError: one is another; its argument is the field that names the file.
    """
    for field, file in now.items():
        before = (began or {}).get(field)
        if before is None:
            logger.warning("%s: which one this run began with was not kept then; this one is taken", field)
        elif before.get("sha256", before) != file.get("sha256", file):
            raise InputError(
                f"is {_which(file)}, and this run began with {_which(before)}; give that one, wherever it lies now, or "
                "choose another output_dir",
                argument=field,
            )


def _which(file: dict[str, Any]) -> str:
    digest = file.get("sha256")
    return f"{file.get('name')} (sha256 {digest[:12]})" if digest else str(file.get("name"))


def find_run_images(config: RunConfig, *, resumed: bool) -> ImageIndex:
    """The images of `data_path`; a continued run keeps the list and the order that it began with.

    Raises:
        InputError: there are none, too many of them are damaged, or a continued run's are others.
    """
    try:
        index = find_images(
            config.data_path,
            split=config.split,
            layout=config.layout,
            max_image_pixels=config.max_image_pixels,
            workers=config.workers,
        )
    except InputError as error:
        error.argument = error.argument or "data_path"
        raise
    saved = Path(config.output_dir) / INDEX
    if resumed and saved.exists():
        index = _as_begun(config, ImageIndex.load(saved), index)
    bad_files = BadFiles(index, config.max_bad_files)
    if bad_files.too_many:
        raise bad_files.error()
    return index


def _as_begun(config: RunConfig, before: ImageIndex, now: ImageIndex) -> ImageIndex:
    """The list that the run began with, where the images are now; those damaged since are found when they are read.

    Folders may have become shards, and shards may be packed anew: an image is known by its name.
    """
    if before.paths == now.paths and np.array_equal(before.sizes, now.sizes):
        return now
    if {*before.paths, *before.damaged} != {*now.paths, *now.damaged}:
        raise InputError(
            f"{config.data_path} holds {len(now)} images, not the {len(before)} that this run began with, or others; "
            "restore them, or choose another output_dir",
            argument="data_path",
        )
    where = {path: i for i, path in enumerate(now.paths)}
    at = np.array([where.get(path, -1) for path in before.paths])
    lies = {"num_bytes": 1, "verdicts": 0, "spans": 0}  # in each array, what stands for one that is damaged now
    arrays = {name: getattr(now, name) for name in lies}
    found = {
        name: None if array is None else np.where((at < 0).reshape(-1, *(1,) * (array.ndim - 1)), lies[name], array[at])
        for name, array in arrays.items()
    }
    return replace(before, root=now.root, shards=now.shards, stamps=now.stamps, **found)
