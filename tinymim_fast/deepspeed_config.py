"""DeepSpeed's configuration: what a run's settings mean to it, with a user's JSON file merged in."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from deepspeed.runtime import constants

from tinymim_fast.batches import BatchPlan
from tinymim_fast.errors import InputError

MAX_JSON = 1 << 20  # bytes


def deepspeed_config(
    batches: BatchPlan,
    *,
    zero_stage: int,
    bf16: bool,
    clip_grad: float = 0.0,
    skip_nonfinite: bool = False,
    deepspeed_config: str | Path | None = None,
) -> dict[str, Any]:
    """The DeepSpeed configuration that these settings mean, with a user's file merged in.

    Args:
        batches: how the global batch is divided.
        zero_stage: 0 to 3.
        bf16: bf16 weights with fp32 master weights and fp32 gradient accumulation; at stage 0 bf16 autocast over fp32
            weights.
        clip_grad: largest gradient norm; 0 does not clip.
        skip_nonfinite: look at each step's gradient, which waits for the device, and leave out a step where it is NaN
            or infinite: see `Engine.step`.
        deepspeed_config: a DeepSpeed JSON file; may add what is not said here, and may not contradict it.

    Raises:
        InputError: the file is missing or no JSON object, or contradicts a setting; names the key and the setting.
    """
    ours: dict[str, Any] = {
        "train_batch_size": batches.global_batch_size,
        "train_micro_batch_size_per_gpu": batches.micro_batch_size,
        "gradient_accumulation_steps": batches.accumulation_steps,
        "gradient_clipping": clip_grad,
        # round_robin_gradients on two ranks: safe_get_full_fp32_param gave other weights' values (DeepSpeed 0.19.8)
        "zero_optimization": {"stage": zero_stage, "round_robin_gradients": False},
        # A gradient that isn't finite makes the next loss so, which the loop looks at; a check here reads the device.
        "bf16": {"enabled": bf16, "check_grad_overflow": skip_nonfinite},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": None,
    }
    if bf16 and zero_stage == 0:
        # Without ZeRO, DeepSpeed has no fp32 accumulation for bf16 weights; autocast over fp32 weights is the same.
        ours["bf16"]["enabled"] = False
        ours["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    no_norm = zero_stage == 2 or (zero_stage == 1 and not bf16)  # others compute it whatever one says
    if no_norm and not clip_grad and not skip_nonfinite:
        ours["zero_optimization"]["compute_grad_norm"] = False
    if zero_stage == 3:
        # Replaces F.linear for the whole process, the teacher's too; the gradient of bf16 weights is then another one.
        ours["zero_optimization"]["memory_efficient_linear"] = False
    if deepspeed_config is None:
        return ours
    path = Path(deepspeed_config)
    theirs = _read_json(path)
    for section in ("optimizer", "scheduler"):
        if section in theirs:
            raise InputError(
                f"{path}: '{section}' is set by lr_base, weight_decay, warmup_epochs and the like; leave it out",
                argument="deepspeed_config",
            )
    if not isinstance(theirs.get("steps_per_print"), int | None):
        raise InputError(
            f"{path}: steps_per_print is {theirs['steps_per_print']!r}, want a whole number",
            argument="deepspeed_config",
        )
    return _merge(ours, theirs, path)


def _read_json(path: Path) -> dict[str, Any]:
    """A user's DeepSpeed configuration; keys that stand twice, and ones that are almost DeepSpeed's, are errors."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        repeated = next((key for key in keys if keys.count(key) > 1), None)
        if repeated is not None:
            raise ValueError(f"the key {repeated} stands there twice")
        return dict(pairs)

    try:
        if not path.is_file():
            raise OSError("no such file")
        if path.stat().st_size > MAX_JSON:
            raise ValueError(f"{path.stat().st_size} bytes, want at most {MAX_JSON}")
        theirs = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=once)
        if not isinstance(theirs, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} can't be read: {error}", argument="deepspeed_config") from error
    known = {value for value in vars(constants).values() if isinstance(value, str)}
    for key in theirs.keys() - known:
        likely = get_close_matches(key, known, n=1, cutoff=0.85)
        if likely:
            raise InputError(f"{path}: {key}: did you mean {likely[0]}?", argument="deepspeed_config")
    return theirs


@contextlib.contextmanager
def refusals(deepspeed_config: str | Path | None) -> Iterator[None]:
    """What DeepSpeed says against a user's file, inside the with block, as one line.

    Args:
        deepspeed_config: the file; None: errors pass as they are.

    Raises:
        InputError: DeepSpeed refused; names the file and the key where DeepSpeed does.
    """
    try:
        yield
    except Exception as error:
        if deepspeed_config is None or isinstance(error, InputError):
            raise
        reason = str(error).split("\n")[0] or type(error).__name__
        if hasattr(error, "errors"):  # pydantic's, one of many lines
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise InputError(f"{deepspeed_config}: DeepSpeed refuses it: {reason}", argument="deepspeed_config") from error


SETTINGS = {  # what to change instead of DeepSpeed's key
    "train_batch_size": "train_batch_size",
    "train_micro_batch_size_per_gpu": "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "clip_grad",
    "zero_optimization.stage": "zero_stage",
    "bf16.enabled": "bf16",
}


def _merge(ours: dict[str, Any], theirs: dict[str, Any], path: Path, prefix: str = "") -> dict[str, Any]:
    merged = dict(ours)
    for key, value in theirs.items():
        name = prefix + key
        mine = ours.get(key)
        if isinstance(value, dict) and isinstance(mine, dict):
            merged[key] = _merge(mine, value, path, name + ".")
        elif key not in ours or mine is None:
            merged[key] = value
        elif value not in ("auto", mine):
            setting = SETTINGS.get(name)
            out = f"make {setting} equal or leave it out of the file" if setting else "leave it out of the file"
            raise InputError(
                f"{path}: {name} is {value!r}, but this run has {mine!r}; {out}", argument="deepspeed_config"
            )
    return merged
