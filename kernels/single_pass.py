"""Triton: the row losses and the gradient in one pass over the logits, for up to 256 tokens.

One program per (image, relation, head). All keys stay on the chip, queries pass by in small blocks, so a block
sees whole rows of the relations, transposed: S^T is keys x queries, softmax runs down the columns. In bits,

    a = scale_t * log2(e) * Y_t X_t^T        e_t = 2^a        l_t = sum over keys of e_t       (b, e_s, l_s alike)
    row = ln 2 * (sum of e_t (a - b) / l_t - log2 l_t + log2 l_s)
    dS  = e_s / l_s - e_t / l_t              taken in fp32, before any rounding
    dX  = scale_s * dS^T Y_s,  dY = scale_s * dS X_s          where x is y, their sum

No row maximum is subtracted: it would cost two reductions across lanes, a fifth of all instructions. The sums
tell whether that was sound. Within 2^-60 and 2^60 nothing overflowed and what underflowed is below 2^-58 of the
row; a program that sees another sum raises a flag, and a second launch with EXACT, in which all other programs
return at once, computes its rows with their maxima.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinymim_fast.kernels.device_math import LN_2, MASKED, exp2, locate, log2, reciprocal, valid_tokens
from tinymim_fast.kernels.operands import Launch, Operands, padded
from tinymim_fast.kernels.tiles import TileConfig

LARGEST_SUM = tl.constexpr(2.0**60)


@triton.jit
def single_pass_kernel(
    x_s_ptr,
    y_s_ptr,
    x_t_ptr,
    y_t_ptr,
    d_x_ptr,
    d_y_ptr,
    rows_ptr,
    sums_ptr,
    flags_ptr,
    lengths_ptr,
    weights_ptr,
    weight_scales_ptr,
    stride_x_s_b,
    stride_x_s_h,
    stride_x_s_n,
    stride_y_s_b,
    stride_y_s_h,
    stride_y_s_n,
    stride_x_t_b,
    stride_x_t_h,
    stride_x_t_n,
    stride_y_t_b,
    stride_y_t_h,
    stride_y_t_n,
    stride_d_x_b,
    stride_d_x_h,
    stride_d_x_n,
    stride_d_y_b,
    stride_d_y_h,
    stride_d_y_n,
    stride_s_p,
    stride_t_p,
    stride_d_p,
    num_heads,
    num_relations,
    num_tokens,
    codes_x,
    codes_y,
    bits_s,
    bits_t,
    scale_s,
    HEAD_DIM_S: tl.constexpr,
    HEAD_DIM_T: tl.constexpr,
    BLOCK_D_S: tl.constexpr,
    BLOCK_D_T: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    GAIN: tl.constexpr,
    PRECISION_S: tl.constexpr,
    PRECISION_T: tl.constexpr,
    PTX: tl.constexpr,
    EXACT: tl.constexpr,
):
    pid = tl.program_id(0)
    if EXACT and flags_ptr is not None and tl.load(flags_ptr + pid) == 0:
        return
    image, head, x_p, y_p = locate(pid, num_heads, num_relations, codes_x, codes_y)
    length = valid_tokens(lengths_ptr, image, num_tokens)
    x_s_ptr += image * stride_x_s_b + head * stride_x_s_h + x_p * stride_s_p
    y_s_ptr += image * stride_y_s_b + head * stride_y_s_h + y_p * stride_s_p
    x_t_ptr += image * stride_x_t_b + head * stride_x_t_h + x_p * stride_t_p
    y_t_ptr += image * stride_y_t_b + head * stride_y_t_h + y_p * stride_t_p
    sums_ptr += pid.to(tl.int64) * (3 * BLOCK_KEYS)

    offs_k = tl.arange(0, BLOCK_KEYS)
    offs_d_s = tl.arange(0, BLOCK_D_S)
    offs_d_t = tl.arange(0, BLOCK_D_T)
    mask_d_s = (offs_d_s < HEAD_DIM_S)[None, :]
    mask_d_t = (offs_d_t < HEAD_DIM_T)[None, :]
    mask_k = (offs_k < length)[:, None]
    # With no valid token, one key of zeros counts: losses and gradients come out 0, not NaN. Queries beyond the
    # length read as zeros, and both their relations are uniform: 0 as well, without a mask on the map.
    counts = (offs_k < tl.maximum(length, 1))[:, None]
    bias = tl.where(counts, 0.0, MASKED)  # (keys, 1), added by the instruction that scales the logits

    y_s = tl.load(
        y_s_ptr + offs_k[:, None] * stride_y_s_n + offs_d_s[None, :], mask=mask_k & mask_d_s, other=0.0
    )  # (keys, D_s)
    y_t = tl.load(
        y_t_ptr + offs_k[:, None] * stride_y_t_n + offs_d_t[None, :], mask=mask_k & mask_d_t, other=0.0
    )  # (keys, D_t)
    if weight_scales_ptr is not None:
        scale_s *= tl.load(weight_scales_ptr + pid)
    scale_s *= 1.0 / GAIN
    if d_x_ptr is not None:
        d_x_ptr += image * stride_d_x_b + head * stride_d_x_h + x_p * stride_d_p
    if d_y_ptr is not None:
        d_y = tl.zeros([BLOCK_KEYS, BLOCK_D_S], tl.float32)

    for start in tl.range(0, num_tokens, BLOCK_QUERIES, num_stages=NUM_STAGES):
        offs_q = start + tl.arange(0, BLOCK_QUERIES)
        mask_q = (offs_q < length)[:, None]
        x_t = tl.load(
            x_t_ptr + offs_q[:, None] * stride_x_t_n + offs_d_t[None, :], mask=mask_q & mask_d_t, other=0.0
        )  # (queries, D_t)
        x_s = tl.load(
            x_s_ptr + offs_q[:, None] * stride_x_s_n + offs_d_s[None, :], mask=mask_q & mask_d_s, other=0.0
        )  # (queries, D_s)
        a = tl.dot(y_t, tl.trans(x_t), input_precision=PRECISION_T) * bits_t  # (keys, queries)
        b = tl.dot(y_s, tl.trans(x_s), input_precision=PRECISION_S) * bits_s
        if EXACT:
            a = tl.where(counts, a, MASKED)
            b = tl.where(counts, b, MASKED)
            a -= tl.max(a, 0)[None, :]
            b -= tl.max(b, 0)[None, :]
        else:
            a += bias
            b += bias
        e_t = exp2(a, PTX)
        e_s = exp2(b, PTX)
        weighted = tl.sum(e_t * (a - b), 0)
        l_t = tl.sum(e_t, 0)
        l_s = tl.sum(e_s, 0)
        # Logarithms wait for the end: here, 32 lanes hold copies of each row and each would take its own.
        in_image = offs_q < num_tokens
        tl.store(sums_ptr + offs_q, weighted, mask=in_image)
        tl.store(sums_ptr + BLOCK_KEYS + offs_q, l_t, mask=in_image)
        tl.store(sums_ptr + 2 * BLOCK_KEYS + offs_q, l_s, mask=in_image)

        if d_x_ptr is not None or d_y_ptr is not None:
            inverse = reciprocal(l_t * l_s, PTX)  # one reciprocal for two
            if GAIN != 1.0:
                inverse *= GAIN
            if weights_ptr is not None:
                inverse *= tl.load(weights_ptr + pid.to(tl.int64) * num_tokens + offs_q, mask=in_image, other=0.0)
            d_logits = e_s * (inverse * l_t)[None, :] - e_t * (inverse * l_s)[None, :]
            d_logits = d_logits.to(y_s.dtype)  # (keys, queries)
            if d_y_ptr is not None:
                d_y = tl.dot(d_logits, x_s, d_y, input_precision=PRECISION_S)
            if d_x_ptr is not None:
                d_x = tl.dot(tl.trans(d_logits), y_s, input_precision=PRECISION_S) * scale_s  # (queries, D_s)
                tl.store(
                    d_x_ptr + offs_q[:, None] * stride_d_x_n + offs_d_s[None, :],
                    d_x.to(d_x_ptr.dtype.element_ty),
                    mask=in_image[:, None] & mask_d_s,
                )

    tl.debug_barrier()  # other threads of this program wrote what is read from here on
    in_image = offs_k < num_tokens
    if d_y_ptr is not None:
        d_y_ptr += image * stride_d_y_b + head * stride_d_y_h + y_p * stride_d_p
        d_y_ptrs = d_y_ptr + offs_k[:, None] * stride_d_y_n + offs_d_s[None, :]
        mask = in_image[:, None] & mask_d_s
        d_y *= scale_s
        if d_x_ptr is not None and x_p == y_p:  # one tensor's gradient: dX is already there
            d_y += tl.load(d_y_ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(d_y_ptrs, d_y.to(d_y_ptr.dtype.element_ty), mask=mask)
    weighted = tl.load(sums_ptr + offs_k, mask=in_image, other=0.0)
    l_t = tl.load(sums_ptr + BLOCK_KEYS + offs_k, mask=in_image, other=1.0)
    l_s = tl.load(sums_ptr + 2 * BLOCK_KEYS + offs_k, mask=in_image, other=1.0)
    row = weighted * reciprocal(l_t, PTX) - log2(l_t, PTX) + log2(l_s, PTX)
    tl.store(rows_ptr + pid.to(tl.int64) * num_tokens + offs_k, row * LN_2, mask=in_image)
    if not EXACT:
        largest = tl.max(tl.maximum(l_t, l_s), 0)
        smallest = tl.min(tl.minimum(l_t, l_s), 0)
        out_of_range = (largest > LARGEST_SUM) | (smallest * LARGEST_SUM < 1.0)
        tl.store(flags_ptr + pid, out_of_range.to(tl.int32))


def launches(operands: Operands, tile: TileConfig) -> tuple[Tensor, list[Launch]]:
    """The launches, and where they leave the row losses: (relations, B, H, N) in fp32.

    Gradients go where `operands` has room for them. Memory: four numbers per row and a flag per head, no map.
    """
    num_images, num_heads, num_tokens, _ = operands.x_s.shape
    block_keys = padded(num_tokens)
    num_programs = num_images * operands.num_relations * num_heads
    new = {"device": operands.x_s.device}
    rows = torch.empty(num_images, operands.num_relations, num_heads, num_tokens, **new)
    sums = torch.empty(num_programs, 3, block_keys, **new)
    # Rows this short gain nothing, and with their maxima a single key has a loss and a gradient of exactly 0.
    always_exact = block_keys == 16
    flags = None if always_exact else torch.empty(num_programs, dtype=torch.int32, **new)
    arguments = {
        **operands.arguments(),
        "rows_ptr": rows,
        "sums_ptr": sums,
        "flags_ptr": flags,
        "BLOCK_KEYS": block_keys,
        "BLOCK_QUERIES": tile.block_queries,
        "NUM_STAGES": tile.num_stages,
    }
    return rows.transpose(0, 1), [
        Launch(single_pass_kernel, (num_programs,), {**arguments, "EXACT": exact}, tile.num_warps)
        for exact in ((True,) if always_exact else (False, True))
    ]
