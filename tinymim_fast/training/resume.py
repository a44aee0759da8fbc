"""What a continued run may find: its checkpoint, its configuration, its images, its bad files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml

from tinymim_fast.config import RunConfig, differences
from tinymim_fast.data import ImageIndex, find_images
from tinymim_fast.data.bad_files import BadFiles
from tinymim_fast.errors import InputError
from tinymim_fast.models.checkpoints import latest_checkpoint

CONFIG = "config.yaml"
INDEX = "index.npz"


def find_checkpoint(config: RunConfig) -> Path | None:
    """The checkpoint to go on from, None for a new run.

    Raises:
        InputError: the folder holds another run, or `resume` is "none" and it holds checkpoints.
    """
    output_dir = Path(config.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"{output_dir} is a file, want a folder", argument="output_dir")
    latest = latest_checkpoint(output_dir)
    if config.resume == "none":
        if latest is not None:
            raise InputError(
                f'{output_dir} holds {latest.name}; resume "none" wants a folder without checkpoints',
                argument="output_dir",
            )
        return None
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
    return latest


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
