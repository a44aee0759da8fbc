"""Precision of a frozen model: its weights' dtype, and integer or fp8 products for its linear layers."""

from __future__ import annotations

import importlib
import importlib.util
import warnings

import torch
from torch import nn

from tinymim_fast.errors import InputError
from tinymim_fast.models.attention import architecture
from tinymim_fast.models.vit import freeze

PRECISIONS = ("fp32", "bf16", "int8", "fp8")


def choose_precision(choice: str, device: torch.device) -> str:
    """A precision that the device can run; "auto" is bf16 where it has instructions for it, else fp32.

    Args:
        choice: one of `PRECISIONS`, or "auto".
        device: where the model will be.

    Raises:
        InputError: the device or an absent package can't; argument "precision".
    """
    if choice == "auto":
        return "bf16" if has_bf16(device) else "fp32"
    why = _why_not(choice, device)
    if why:
        can = [name for name in PRECISIONS if not _why_not(name, device)]
        raise InputError(
            f"got {choice}, {why}; here auto, {', '.join(can[:-1])} and {can[-1]} run", argument="precision"
        )
    return choice


def has_bf16(device: torch.device) -> bool:
    """Whether it multiplies bf16 numbers in hardware; emulated, they are slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return architecture(device) in ("cpu_amx", "cpu_avx512_bf16")


def lower_precision(model: nn.Module, precision: str, device: torch.device) -> torch.dtype:
    """Freeze a model in place, on `device`: evaluation mode, no gradients; returns the dtype of its inputs.

    "int8" and "fp8" quantise each linear layer's weights once, row by row, and its inputs at each call; everything
    else, the attention too, runs in bf16 (fp32 for int8 on a CPU).

    Args:
        model: fp32.
        precision: from `choose_precision`.
        device: where it goes.
    """
    dtype = torch.float32 if precision == "fp32" or (precision == "int8" and device.type == "cpu") else torch.bfloat16
    freeze(model, dtype, device)
    if precision == "int8" and device.type == "cpu":
        with warnings.catch_warnings():  # deprecated in favour of torchao
            warnings.simplefilter("ignore")
            torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)
    elif precision in ("int8", "fp8"):
        torchao = importlib.import_module("torchao.quantization")
        torchao.quantize_(model, getattr(torchao, TORCHAO[precision])())
    return dtype


TORCHAO = {"int8": "Int8DynamicActivationInt8WeightConfig", "fp8": "Float8DynamicActivationFloat8WeightConfig"}


def _why_not(precision: str, device: torch.device) -> str | None:
    """Why the device can't run it; None where it can."""
    if precision in ("fp32", "bf16"):
        return None
    if device.type == "cpu":
        return "which needs a GPU" if precision == "fp8" else None
    if device.type != "cuda":
        return f"which nothing runs on {device.type}"
    if precision == "fp8" and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 9):
        return f"which needs compute capability 8.9 or more, and this is {architecture(device)}"
    if importlib.util.find_spec("torchao") is None:
        return "which needs torchao, and that is not installed (pip install 'tinymim_fast[torchao]')"
    return None
