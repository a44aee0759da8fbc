"""The flags that say which checkpoint a program reads, and what it is where the file can't tell."""

from __future__ import annotations

import argparse
import json
from typing import Any

from tinymim_fast.errors import InputError

CHECKPOINT_FLAGS = {"source": "CHECKPOINT", "model": "--model", "model_kwargs": "--model-kwargs", "key": "--key"}


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """`CHECKPOINT`, `--model`, `--model-kwargs` and `--key`."""
    parser.add_argument(
        "checkpoint", help="a run's output folder, a checkpoint, an export, a file of weights, or timm:NAME"
    )
    parser.add_argument("--model", help="timm name, where the file can't tell")
    parser.add_argument(
        "--model-kwargs", default="{}", metavar="JSON", help="for that model, e.g. '{\"num_heads\": 6}'"
    )
    parser.add_argument("--key", help="of several models in one file, the one below this key")


def checkpoint_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What was given, as `load_encoder`'s arguments.

    Raises:
        InputError: `--model-kwargs` is no JSON object, argument "model_kwargs".
    """
    return {"model": args.model, "model_kwargs": json_object(args.model_kwargs, "model_kwargs"), "key": args.key}


def json_object(text: str, argument: str) -> dict[str, Any]:
    """What a flag gives as JSON.

    Raises:
        InputError: it is none.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"got {text}, want a JSON object: {error}", argument=argument) from error
