"""Triton: a gradient times the upstream gradient, in place and, where that is 1, without touching it.

The forward pass writes the gradient of the loss as if nothing followed. Mostly nothing does: a factor of exactly 1 is
seen on the device, by every program, and costs a launch instead of a pass over memory.
"""

import triton
import triton.language as tl
from torch import Tensor

from tinymim_fast.kernels.operands import Launch, launch

BLOCK = 1024
MAX_PROGRAMS = 2048


@triton.jit
def rescale_kernel(
    gradient_ptr,
    upstream_ptr,
    count_ptr,
    stride_upstream,
    num_blocks,
    width,
    num_parts,
    relations,
    inverse_count,
    BLOCK: tl.constexpr,
):
    """gradient[row, :] *= upstream[relation] / count, with part = row % num_parts and relation = two bits of a part.

    gradient is (rows, width); a program takes every num_programs-th of its blocks.
    """
    if count_ptr is not None:
        inverse_count /= tl.load(count_ptr)
    blocks_of_row = tl.cdiv(width, BLOCK)
    others = 0
    for part in tl.range(0, num_parts):
        factor = tl.load(upstream_ptr + ((relations >> (2 * part)) & 3) * stride_upstream) * inverse_count
        others += (factor != 1.0).to(tl.int32)
    if others == 0:
        return
    for block in tl.range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        row = block // blocks_of_row
        part = row % num_parts
        factor = tl.load(upstream_ptr + ((relations >> (2 * part)) & 3) * stride_upstream) * inverse_count
        offs = (block % blocks_of_row) * BLOCK + tl.arange(0, BLOCK)
        mask = offs < width
        ptrs = gradient_ptr + row.to(tl.int64) * width + offs
        gradient = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32) * factor
        tl.store(ptrs, gradient.to(gradient_ptr.dtype.element_ty), mask=mask)


def launches(
    gradient: Tensor, upstream: Tensor, relations: tuple[int, ...], count: float | Tensor, width: int
) -> list[Launch]:
    """The launch of gradient *= upstream / count, in place.

    Args:
        gradient: dense, of rows of `width` elements; row i is of part i % len(relations).
        upstream: (R,) or () in fp32.
        relations: of each part, which of `upstream` is its factor.
        count: a number, or a tensor of one fp32.
        width: of a row.
    """
    on_device = isinstance(count, Tensor)
    num_blocks = gradient.numel() // width * triton.cdiv(width, BLOCK)
    arguments = {
        "gradient_ptr": gradient,
        "upstream_ptr": upstream,
        "count_ptr": count if on_device else None,
        "stride_upstream": upstream.stride(0) if upstream.ndim else 0,
        "num_blocks": num_blocks,
        "width": width,
        "num_parts": len(relations),
        "relations": sum(relation << (2 * part) for part, relation in enumerate(relations)),
        "inverse_count": 1.0 if on_device else 1.0 / count,
        "BLOCK": BLOCK,
    }
    return [launch(rescale_kernel, (min(num_blocks, MAX_PROGRAMS),), arguments, num_warps=4)]
