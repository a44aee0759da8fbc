"""Backend "triton": which kernel, with which tile, on which tensors."""

import contextlib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from tinymim_fast.kernels import tiles
from tinymim_fast.kernels.operands import Launch, Operands, padded, with_shared_strides

Tile = tiles.SinglePassTile | tiles.TiledTile

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 128


def _triton_version() -> tuple[int, ...] | None:
    """(major, minor), None where there is no Triton. Reads the package's metadata: importing it takes its time."""
    if importlib.util.find_spec("triton") is None:
        return None
    for name in ("triton", "pytorch-triton-rocm", "pytorch-triton", "triton-rocm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return tuple(int(part) for part in re.findall(r"\d+", importlib.metadata.version(name))[:2])
    import triton  # built from source, or under another name

    return tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])


TRITON_VERSION = _triton_version()
# For sm_90, 3.2 aborts the process, 3.3 does not compile the kernels and 3.4 spills.
OLDEST_TRITON = (3, 5)
# Kernels run in Triton's interpreter, on the CPU. Triton reads this when it is imported; so does this module.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def relation_kl(
    x_s: Tensor,
    y_s: Tensor,
    x_t: Tensor,
    y_t: Tensor,
    *,
    scale_s: float,
    scale_t: float,
    lengths: Tensor | None = None,
    row_weights: Tensor | None = None,
    d_x: Tensor | None = None,
    d_y: Tensor | None = None,
) -> Tensor | None:
    """As chunked.relation_kl, without a map in memory; fp32 row losses.

    d_x and d_y have the same strides. Where x and y of one side have not, they are copied.
    """
    x_s, y_s = with_shared_strides(x_s, y_s)
    x_t, y_t = with_shared_strides(x_t, y_t)
    operands = Operands(
        x_s=x_s,
        y_s=y_s,
        x_t=x_t,
        y_t=y_t,
        d_x=d_x,
        d_y=d_y,
        scale_s=scale_s,
        scale_t=scale_t,
        lengths=lengths,
        weights=row_weights,
        relations=((0, 0) if d_x is not None and d_x is d_y else (0, 1),),
    )
    rows = run(operands)
    return None if rows is None else rows[0]


def packed_relation_kl(
    student: dict[str, Tensor],
    teacher: dict[str, Tensor],
    relations: Sequence[str],
    *,
    scale_s: float,
    scale_t: float,
    lengths: Tensor | None = None,
    d_student: dict[str, Tensor] | None = None,
) -> Tensor:
    """As chunked.packed_relation_kl, all relations in one launch."""
    d_q = None if d_student is None else d_student["q"]
    operands = Operands(
        x_s=student["q"],
        y_s=student["q"],
        x_t=teacher["q"],
        y_t=teacher["q"],
        d_x=d_q,
        d_y=d_q,
        scale_s=scale_s,
        scale_t=scale_t,
        lengths=lengths,
        relations=tuple(("qkv".index(x), "qkv".index(y)) for x, y in relations),
        stride_s_p=_projection_stride(student),
        stride_t_p=_projection_stride(teacher),
        stride_d_p=0 if d_student is None else _projection_stride(d_student),
    )
    return run(operands)


def run(operands: Operands, tile: Tile | None = None) -> Tensor | None:
    """Row losses (relations, B, H, N), None with row weights; `tile` is the checked-in one if None."""
    rows, launches = plan(operands, tile or choose_tile(operands))
    device = operands.x_s.device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for launch in launches:
            launch.run()
    return rows


def plan(operands: Operands, tile: Tile) -> tuple[Tensor | None, list[Launch]]:
    """Where the row losses will be, and the launches."""
    # Triton is imported with the first plan: it is absent on some platforms.
    from tinymim_fast.kernels import single_pass, tiled

    return (single_pass if isinstance(tile, tiles.SinglePassTile) else tiled).launches(operands, tile)


def choose_tile(operands: Operands) -> Tile:
    """The checked-in tile for these tensors."""
    what = problem(operands)
    # The single pass adds 32-bit offsets within an image and head.
    if operands.largest_offset() >= 2**31:
        return tiles.default_tiled(what)
    return tiles.choose(what)


def problem(operands: Operands, arch: str | None = None) -> tiles.Problem:
    """What the tile depends on; `arch` is that of the tensors' device if None."""
    return tiles.Problem(
        arch=arch or _arch(operands.x_s.device),
        bucket=padded(operands.x_s.shape[2]),
        head_dim_s=padded(operands.x_s.shape[3]),
        head_dim_t=padded(operands.x_t.shape[3]),
        itemsize=max(operands.x_s.element_size(), operands.x_t.element_size()),
    )


def why_not(x_s: Tensor, x_t: Tensor) -> str | None:
    """Why this backend cannot take the tensors (B, H, N, D); None if it can."""
    if TRITON_VERSION is None:
        return "but triton is not installed"
    if TRITON_VERSION < OLDEST_TRITON:
        got, want = (".".join(map(str, version)) for version in (TRITON_VERSION, OLDEST_TRITON))
        return f"but triton is {got}; it needs at least {want}, which torch 2.9 brings"
    device = x_s.device
    if device.type != "cuda" and not (device.type == "cpu" and INTERPRETED):
        return (
            f"on {device}; it runs on CUDA and ROCm devices, and on the CPU in Triton's interpreter, "
            "for which TRITON_INTERPRET=1 must be in the environment from the start"
        )
    for z in (x_s, x_t):
        if z.dtype not in DTYPES:
            return f"on {z.dtype}; it takes fp32, fp16 and bf16"
        if z.shape[3] > MAX_HEAD_DIM:
            return f"on heads of width {z.shape[3]}; it takes at most {MAX_HEAD_DIM}"
    return None


@cache
def _arch(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def _projection_stride(projections: dict[str, Tensor]) -> int:
    return projections["k"].storage_offset() - projections["q"].storage_offset()
