"""What a continued run may find: its checkpoint, its configuration, its images, its bad files."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import yaml

from tinymim_fast.config import RunConfig, differences
from tinymim_fast.data import ImageIndex, find_images
from tinymim_fast.data.bad_files import BadFiles
from tinymim_fast.errors import InputError
from tinymim_fast.models.checkpoints import list_checkpoints
from tinymim_fast.training.checkpoint import damage

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
    saved = output_dir / CONFIG
    if saved.exists():
        changed = differences(yaml.safe_load(saved.read_text(encoding="utf-8")), config)
        if changed:
            raise InputError(
                f"{output_dir} holds a run with another configuration ({'; '.join(changed)}); "
                "choose another folder, or the same configuration to continue it",
                argument="output_dir",
            )
    elif latest is not None:
        raise InputError(
            f"{output_dir} holds checkpoints but no {CONFIG}; choose another folder", argument="output_dir"
        )
    return _newest_good(candidates, verify=config.verify_checkpoints)


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
    """The list that the run began with, where the images are now; those damaged since are found when they are read."""
    same = before.paths == now.paths and np.array_equal(before.sizes, now.sizes)
    if same:
        return now
    if {*before.paths, *before.damaged} != {*now.paths, *now.damaged} or before.shards != now.shards:
        raise InputError(
            f"{config.data_path} holds {len(now)} images, not the {len(before)} that this run began with, or others; "
            "restore them, or choose another output_dir",
            argument="data_path",
        )
    return replace(before, root=now.root)
