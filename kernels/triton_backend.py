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

from tinymim_fast.kernels import replay, tiles
from tinymim_fast.kernels.operands import Launch, Operands, padded, with_shared_strides
from tinymim_fast.kernels.reference import projections

Tile = tiles.SinglePassTile | tiles.TiledTile

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 1024


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
    gradient_scale: float = 1.0,
) -> Tensor | None:
    """As chunked.relation_kl, without a map in memory; fp32 row losses.

    d_x and d_y have the same strides and get `gradient_scale` times the gradient. Where the strides of x and y of one
    side differ, they are copied.
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
        gradient_scale=gradient_scale,
    )
    rows = run(operands)
    return None if rows is None else rows[0]


def packed_relation_kl(
    qkv_s: Tensor,
    qkv_t: Tensor,
    relation_heads: int,
    relations: Sequence[str],
    *,
    lengths: Tensor | None = None,
    d_qkv: Tensor | None = None,
    gradient_scale: float = 1.0,
) -> Tensor:
    """As chunked.packed_relation_kl, all relations in one launch, and replayed: row losses (relations, B, H, N)."""
    lengths = None if lengths is None else lengths.contiguous()
    tensors = {"x_s_ptr": qkv_s, "y_s_ptr": qkv_s, "x_t_ptr": qkv_t, "y_t_ptr": qkv_t}
    tensors |= {"d_x_ptr": d_qkv, "d_y_ptr": d_qkv, "lengths_ptr": lengths}
    key = (
        *(_geometry(z) for z in (qkv_s, qkv_t, lengths, d_qkv)),
        relation_heads,
        tuple(relations),
        gradient_scale,
        torch.get_float32_matmul_precision(),
    )

    def plan_packed() -> list[Launch]:
        student, teacher = (projections(qkv, relation_heads) for qkv in (qkv_s, qkv_t))
        d_q = None if d_qkv is None else projections(d_qkv, relation_heads)["q"]
        operands = Operands(
            x_s=student["q"],
            y_s=student["q"],
            x_t=teacher["q"],
            y_t=teacher["q"],
            d_x=d_q,
            d_y=d_q,
            scale_s=student["q"].shape[3] ** -0.5,
            scale_t=teacher["q"].shape[3] ** -0.5,
            lengths=lengths,
            relations=tuple(("qkv".index(x), "qkv".index(y)) for x, y in relations),
            stride_s_p=qkv_s.shape[2] // 3,
            stride_t_p=qkv_t.shape[2] // 3,
            stride_d_p=qkv_s.shape[2] // 3,
            gradient_scale=gradient_scale,
        )
        return plan(operands, choose_tile(operands))[1]

    with _on(qkv_s.device):
        return replay.run(key, tensors, plan_packed).transpose(0, 1)


def rescale(
    gradient: Tensor, upstream: Tensor, relations: tuple[int, ...], count: float | Tensor, width: int | None = None
) -> None:
    """gradient *= upstream / count in place; where that is 1, a launch and no pass over memory, without a sync.

    Args:
        gradient: dense, of rows of `width` elements (all in one if None); row i is of part i % len(relations).
        upstream: (R,) or ().
        relations: of each part, which of `upstream` is its factor.
        count: a number, or a tensor of one.
    """
    from tinymim_fast.kernels import rescale as kernel

    width = width or gradient.numel()
    upstream = upstream.float()
    on_device = isinstance(count, Tensor)
    count = count.float() if on_device else count
    tensors = {"gradient_ptr": gradient, "upstream_ptr": upstream, "count_ptr": count if on_device else None}
    key = ("rescale", *map(_geometry, tensors.values()), relations, None if on_device else count, width)
    with _on(gradient.device):
        replay.run(key, tensors, lambda: kernel.launches(gradient, upstream, relations, count, width))


def run(operands: Operands, tile: Tile | None = None) -> Tensor | None:
    """Row losses (relations, B, H, N), None with row weights; `tile` is the checked-in one if None."""
    rows, launches = plan(operands, tile or choose_tile(operands))
    with _on(operands.x_s.device):
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
        d_y=operands.d_y is not None,
        lengths=operands.lengths is not None,
    )


def why_not(device: torch.device, dtypes: Sequence[torch.dtype], head_dims: Sequence[int]) -> str | None:
    """Why this backend cannot take tensors (B, H, N, D) of these dtypes and widths D; None if it can."""
    if TRITON_VERSION is None:
        return "but triton is not installed"
    if TRITON_VERSION < OLDEST_TRITON:
        got, want = (".".join(map(str, version)) for version in (TRITON_VERSION, OLDEST_TRITON))
        return f"but triton is {got}; it needs at least {want}, which torch 2.9 brings"
    if device.type != "cuda" and not (device.type == "cpu" and INTERPRETED):
        return (
            f"on {device}; it runs on CUDA and ROCm devices, and on the CPU in Triton's interpreter, "
            "for which TRITON_INTERPRET=1 must be in the environment from the start"
        )
    for dtype in dtypes:
        if dtype not in DTYPES:
            return f"on {dtype}; it takes fp32, fp16 and bf16"
    if max(head_dims) > MAX_HEAD_DIM:
        return f"on heads of width {max(head_dims)}; it takes at most {MAX_HEAD_DIM}"
    return None


@cache
def _arch(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def _geometry(z: Tensor | None) -> tuple | None:
    """What of a tensor a plan depends on."""
    return None if z is None else (z.shape, z.stride(), z.dtype, z.device)


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
