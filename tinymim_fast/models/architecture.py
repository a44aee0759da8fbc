"""The one door to `timm.create_model`: what a file, a recipe or a flag may say of an architecture.

Only a plain timm name and the arguments listed here pass, each with its type and range. timm's other arguments name
places (`pretrained`, `pretrained_cfg`, `cache_dir`, `checkpoint_path`, `hf-hub:` and `local-dir:` names): from a
weights file they would make timm download or open what the file's author chose.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import timm

from tinymim_fast.errors import InputError

MAX_IMG_SIZE = 8192
MAX_DEPTH = 1000


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and math.isfinite(value) and low <= value <= high


def _one_of(*choices: Any) -> Callable[[Any], bool]:
    return lambda value: any(value is choice or (type(value) is str and value == choice) for choice in choices)


def _or_pair(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: check(value) or (type(value) in (list, tuple) and len(value) == 2 and all(map(check, value)))


def _heads(value: Any) -> bool:
    one = _whole(1, 1024)
    return one(value) or (type(value) in (list, tuple) and 0 < len(value) <= MAX_DEPTH and all(map(one, value)))


_flag = (_one_of(True, False), "true or false")
_optional_flag = (_one_of(True, False, None), "true, false or null")
_rate = (lambda value: _number(0, 1)(value) and value < 1, "a probability below 1")
_layer = (
    lambda value: value is None or (type(value) is str and re.fullmatch(r"[A-Za-z0-9_]{1,32}", value) is not None),
    "the name of a layer in timm",
)

# Argument of timm's VisionTransformer: whether a value can be one, and what to say where it can't.
KWARGS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "img_size": (_or_pair(_whole(1, MAX_IMG_SIZE)), f"1 to {MAX_IMG_SIZE} pixels"),
    "patch_size": (_or_pair(_whole(1, 1024)), "1 to 1024 pixels"),
    "in_chans": (_whole(3, 3), "3, the channels of the images"),
    "num_classes": (_whole(0, 1_000_000), "0 to 1000000"),
    "global_pool": (_one_of("", "avg", "avgmax", "max", "token", "map"), "avg, avgmax, max, token, map or nothing"),
    "embed_dim": (_whole(1, 65536), "1 to 65536"),
    "depth": (_whole(1, MAX_DEPTH), f"1 to {MAX_DEPTH}"),
    "num_heads": (_heads, "a number from 1 to 1024, or a list with one for each block"),
    "mlp_ratio": (lambda value: _number(0, 64)(value) and value > 0, "more than 0, at most 64"),
    "qkv_bias": _flag,
    "qk_norm": _flag,
    "scale_attn_norm": _flag,
    "scale_mlp_norm": _flag,
    "proj_bias": _flag,
    "init_values": (lambda value: value is None or _number(-1e3, 1e3)(value), "a number or null"),
    "class_token": _flag,
    "pos_embed": (_one_of("", "none", "learn"), "learn or none"),
    "no_embed_class": _flag,
    "reg_tokens": (_whole(0, 4096), "0 to 4096"),
    "pre_norm": _flag,
    "pre_head_dim": (_whole(1, 65536), "1 to 65536"),
    "final_norm": _flag,
    "fc_norm": _optional_flag,
    "pool_include_prefix": _flag,
    "dynamic_img_size": _flag,
    "dynamic_img_pad": _flag,
    "drop_rate": _rate,
    "pos_drop_rate": _rate,
    "patch_drop_rate": _rate,
    "proj_drop_rate": _rate,
    "attn_drop_rate": _rate,
    "drop_path_rate": _rate,
    "weight_init": (_one_of("skip", "reset", "jax", "jax_nlhb", "moco", ""), "skip, reset, jax, jax_nlhb or moco"),
    "fix_init": _flag,
    "norm_layer": _layer,
    "embed_norm_layer": _layer,
    "act_layer": _layer,
}


def check_name(name: Any, argument: str = "model") -> str:
    """`name`, if it is a plain timm name.

    Args:
        name: anything.
        argument: the one to name in the error.

    Raises:
        InputError: not a name that timm knows by itself.
    """
    if type(name) is not str or not re.fullmatch(r"[A-Za-z0-9_]{1,100}(\.[A-Za-z0-9_]{1,100})?", name):
        raise InputError(f"got {shown(name)}, want the plain name of a timm model", argument=argument)
    if not timm.is_model(name):
        raise InputError(f"got {name}, but timm has no model of this name", argument=argument)
    return name


def check_kwargs(kwargs: Any, argument: str = "model_kwargs") -> dict[str, Any]:
    """`kwargs`, if all of it is arguments of `KWARGS` with possible values.

    Args:
        kwargs: anything.
        argument: the one to name in the error.

    Raises:
        InputError: names the first that is not.
    """
    if not isinstance(kwargs, Mapping):
        raise InputError(f"got {shown(kwargs)}, want arguments by name", argument=argument)
    for name, value in kwargs.items():
        if name not in KWARGS:
            raise InputError(f"got {shown(name)}, want any of {', '.join(sorted(KWARGS))}", argument=argument)
        possible, want = KWARGS[name]
        if not possible(value):
            raise InputError(f"got {name} {shown(value)}, want {want}", argument=argument)
    return dict(kwargs)


def shown(value: Any) -> str:
    """`value` for an error message: escaped, and cut where it is long."""
    text = ascii(value) if isinstance(value, (str, int, float, bool, type(None))) else f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:80] + "..."
