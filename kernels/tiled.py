"""Triton: the row losses and the gradient for any number of tokens, in tiles of the relations.

Three launches, without atomics, so that repeat runs are bitwise equal. In bits, with a and b the teacher's and the
student's logits and the row maxima m and sums l built up tile by tile (online softmax):

    statistics  row = ln 2 * (w / l_t - log2 l_t + log2 l_s)   w = sum over keys of e_t ((a - m_t) - (b - m_s))
    gradient    dX = scale_d * dS Y_s      a program has some queries and goes over the keys
    gradient    dY = scale_d * dS^T X_s    a program has some keys and goes over the queries

Both gradients are one kernel, which computes dS again from the statistics:

    dS = (2^(b - m_s) - 2^(a - m_t) l_s / l_t) / l_s

Heads wider than WHOLE_WIDTH, up to 1,024, go through the chip in chunks of their width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinymim_fast.kernels.device_math import LN_2, MASKED, exp2, gain, locate, log2, padded, reciprocal, valid_tokens
from tinymim_fast.kernels.operands import Launch, Operands, launch
from tinymim_fast.kernels.tiles import WHOLE_WIDTH, TiledTile

# Columns of wide heads that are on the chip at a time for the logits, and bytes of a row in a program's share of the
# gradient: fp32, whose products have no matrix unit, spills with more.
CHUNK = tl.constexpr(64)
GRADIENT_BYTES = 512


@triton.jit
def chunked_logits(
    x_ptr,
    y_ptr,
    stride_n,
    offs_x,
    offs_y,
    mask_x,
    mask_y,
    HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x y^T (X, Y), unscaled, with the width in chunks: two chunks are on the chip, and nothing stays there."""
    rows_x = offs_x.to(tl.int64)[:, None]
    rows_y = offs_y.to(tl.int64)[:, None]
    logits = tl.zeros([offs_x.shape[0], offs_y.shape[0]], tl.float32)
    for start in tl.range(0, HEAD_DIM, CHUNK):
        offs_d = start + tl.arange(0, CHUNK)[None, :]
        mask_d = offs_d < HEAD_DIM
        x = tl.load(x_ptr + rows_x * stride_n + offs_d, mask=mask_x[:, None] & mask_d, other=0.0)  # (X, chunk)
        y = tl.load(y_ptr + rows_y * stride_n + offs_d, mask=mask_y[:, None] & mask_d, other=0.0)  # (Y, chunk)
        logits = tl.dot(x, tl.trans(y), logits, input_precision=PRECISION)
    return logits


@triton.jit
def statistics_kernel(
    x_s_ptr,
    y_s_ptr,
    x_t_ptr,
    y_t_ptr,
    rows_ptr,
    statistics_ptr,
    lengths_ptr,
    stride_s_b,
    stride_s_h,
    stride_s_n,
    stride_s_p,
    stride_t_b,
    stride_t_h,
    stride_t_n,
    stride_t_p,
    num_heads,
    num_relations,
    num_tokens,
    projections,
    bits_s,
    bits_t,
    HEAD_DIM_S: tl.constexpr,
    HEAD_DIM_T: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION_S: tl.constexpr,
    PRECISION_T: tl.constexpr,
    PTX: tl.constexpr,
):
    """Row losses, and of each row m_t, l_s / l_t, m_s and 1 / l_s: the formula at the head of this file."""
    pid = tl.program_id(0)
    image, head, x_p, y_p = locate(pid, num_heads, num_relations, projections)
    length = valid_tokens(lengths_ptr, image, num_tokens)
    x_s_ptr += image * stride_s_b + head * stride_s_h + x_p * stride_s_p
    y_s_ptr += image * stride_s_b + head * stride_s_h + y_p * stride_s_p
    x_t_ptr += image * stride_t_b + head * stride_t_h + x_p * stride_t_p
    y_t_ptr += image * stride_t_b + head * stride_t_h + y_p * stride_t_p

    offs_q = tl.program_id(1).to(tl.int64) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    mask_q = offs_q < length
    if not WIDE:
        BLOCK_D_S: tl.constexpr = padded(HEAD_DIM_S)
        BLOCK_D_T: tl.constexpr = padded(HEAD_DIM_T)
        offs_d_s = tl.arange(0, BLOCK_D_S)
        offs_d_t = tl.arange(0, BLOCK_D_T)
        mask_d_s = (offs_d_s < HEAD_DIM_S)[None, :]
        mask_d_t = (offs_d_t < HEAD_DIM_T)[None, :]
        x_s = tl.load(
            x_s_ptr + offs_q[:, None] * stride_s_n + offs_d_s[None, :], mask=mask_q[:, None] & mask_d_s, other=0.0
        )  # (queries, D_s)
        x_t = tl.load(
            x_t_ptr + offs_q[:, None] * stride_t_n + offs_d_t[None, :], mask=mask_q[:, None] & mask_d_t, other=0.0
        )  # (queries, D_t)
    m_t = tl.full([BLOCK_QUERIES], MASKED, tl.float32)
    m_s = tl.full([BLOCK_QUERIES], MASKED, tl.float32)
    l_t = tl.zeros([BLOCK_QUERIES], tl.float32)
    l_s = tl.zeros([BLOCK_QUERIES], tl.float32)
    weighted = tl.zeros([BLOCK_QUERIES], tl.float32)

    for start in tl.range(0, length, BLOCK_KEYS, num_stages=NUM_STAGES):
        offs_k = start + tl.arange(0, BLOCK_KEYS)
        mask_k = offs_k < length
        rows_k = offs_k.to(tl.int64)[:, None]
        if WIDE:
            a = chunked_logits(x_t_ptr, y_t_ptr, stride_t_n, offs_q, offs_k, mask_q, mask_k, HEAD_DIM_T, PRECISION_T)
            b = chunked_logits(x_s_ptr, y_s_ptr, stride_s_n, offs_q, offs_k, mask_q, mask_k, HEAD_DIM_S, PRECISION_S)
            a *= bits_t  # (queries, keys)
            b *= bits_s
        else:
            y_s = tl.load(
                y_s_ptr + rows_k * stride_s_n + offs_d_s[None, :], mask=mask_k[:, None] & mask_d_s, other=0.0
            )  # (keys, D_s)
            y_t = tl.load(
                y_t_ptr + rows_k * stride_t_n + offs_d_t[None, :], mask=mask_k[:, None] & mask_d_t, other=0.0
            )  # (keys, D_t)
            a = tl.dot(x_t, tl.trans(y_t), input_precision=PRECISION_T) * bits_t  # (queries, keys)
            b = tl.dot(x_s, tl.trans(y_s), input_precision=PRECISION_S) * bits_s
        a = tl.where(mask_k[None, :], a, MASKED)
        b = tl.where(mask_k[None, :], b, MASKED)
        new_m_t = tl.maximum(m_t, tl.max(a, 1))
        new_m_s = tl.maximum(m_s, tl.max(b, 1))
        a -= new_m_t[:, None]
        b -= new_m_s[:, None]
        e_t = exp2(a, PTX)
        shrink_t = exp2(m_t - new_m_t, PTX)
        weighted = (weighted + l_t * ((m_t - new_m_t) - (m_s - new_m_s))) * shrink_t + tl.sum(e_t * (a - b), 1)
        l_t = l_t * shrink_t + tl.sum(e_t, 1)
        l_s = l_s * exp2(m_s - new_m_s, PTX) + tl.sum(exp2(b, PTX), 1)
        m_t = new_m_t
        m_s = new_m_s

    inverse_t = reciprocal(l_t, PTX)
    if rows_ptr is not None:
        row = tl.where(mask_q, (weighted * inverse_t - log2(l_t, PTX) + log2(l_s, PTX)) * LN_2, 0.0)
        tl.store(rows_ptr + pid.to(tl.int64) * num_tokens + offs_q, row, mask=offs_q < num_tokens)
    if statistics_ptr is not None:
        statistics_ptr += pid.to(tl.int64) * 4 * num_tokens + offs_q
        tl.store(statistics_ptr, m_t, mask=mask_q)
        # Of equal relations exactly 1, whatever the reciprocal's error: their gradient is exactly 0.
        tl.store(statistics_ptr + num_tokens, tl.where(l_s == l_t, 1.0, l_s * inverse_t), mask=mask_q)
        tl.store(statistics_ptr + 2 * num_tokens, m_s, mask=mask_q)
        tl.store(statistics_ptr + 3 * num_tokens, reciprocal(l_s, PTX), mask=mask_q)


@triton.jit
def gradient_kernel(
    x_s_ptr,
    y_s_ptr,
    x_t_ptr,
    y_t_ptr,
    d_x_ptr,
    d_y_ptr,
    statistics_ptr,
    lengths_ptr,
    weights_ptr,
    weight_scales_ptr,
    stride_s_b,
    stride_s_h,
    stride_s_n,
    stride_s_p,
    stride_t_b,
    stride_t_h,
    stride_t_n,
    stride_t_p,
    stride_d_b,
    stride_d_h,
    stride_d_n,
    stride_d_p,
    num_heads,
    num_relations,
    num_tokens,
    projections,
    bits_s,
    bits_t,
    scale_d,
    HEAD_DIM_S: tl.constexpr,
    HEAD_DIM_T: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    PRECISION_S: tl.constexpr,
    PRECISION_T: tl.constexpr,
    PTX: tl.constexpr,
    OWN_KEYS: tl.constexpr,
):
    """d_own = scale_d * dS other_s; the own tokens are queries, or with OWN_KEYS the keys and dS is transposed.

    With `weights`, row i of dS is multiplied by weights[i] * weight_scales. Of wide heads a program has some columns of
    d_own, and computes all of dS for them.
    """
    pid = tl.program_id(0)
    image, head, x_p, y_p = locate(pid, num_heads, num_relations, projections)
    length = valid_tokens(lengths_ptr, image, num_tokens)
    if OWN_KEYS:
        own_s_ptr, other_s_ptr, own_t_ptr, other_t_ptr = y_s_ptr, x_s_ptr, y_t_ptr, x_t_ptr
        d_own_ptr, own_p, other_p = d_y_ptr, y_p, x_p
    else:
        own_s_ptr, other_s_ptr, own_t_ptr, other_t_ptr = x_s_ptr, y_s_ptr, x_t_ptr, y_t_ptr
        d_own_ptr, own_p, other_p = d_x_ptr, x_p, y_p
    own_s_ptr += image * stride_s_b + head * stride_s_h + own_p * stride_s_p
    own_t_ptr += image * stride_t_b + head * stride_t_h + own_p * stride_t_p
    other_s_ptr += image * stride_s_b + head * stride_s_h + other_p * stride_s_p
    other_t_ptr += image * stride_t_b + head * stride_t_h + other_p * stride_t_p
    d_own_ptr += image * stride_d_b + head * stride_d_h + own_p * stride_d_p
    statistics_ptr += pid.to(tl.int64) * 4 * num_tokens
    GAIN: tl.constexpr = gain(x_s_ptr.dtype.element_ty)
    if weights_ptr is not None:
        weights_ptr += pid.to(tl.int64) * num_tokens
        scale_d *= tl.load(weight_scales_ptr + pid)
    scale_d *= 1.0 / GAIN

    offs_own = tl.program_id(1).to(tl.int64) * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    offs_d_s = tl.arange(0, BLOCK_COLUMNS)
    if WIDE:
        offs_d_s += tl.program_id(2) * BLOCK_COLUMNS
    mask_d_s = (offs_d_s < HEAD_DIM_S)[None, :]
    mask_own = offs_own < length
    if not WIDE:
        BLOCK_D_T: tl.constexpr = padded(HEAD_DIM_T)
        offs_d_t = tl.arange(0, BLOCK_D_T)
        mask_d_t = (offs_d_t < HEAD_DIM_T)[None, :]
        own_s = tl.load(
            own_s_ptr + offs_own[:, None] * stride_s_n + offs_d_s[None, :],
            mask=mask_own[:, None] & mask_d_s,
            other=0.0,
        )  # (own, D_s)
        own_t = tl.load(
            own_t_ptr + offs_own[:, None] * stride_t_n + offs_d_t[None, :],
            mask=mask_own[:, None] & mask_d_t,
            other=0.0,
        )  # (own, D_t)
    if not OWN_KEYS:
        m_t = tl.load(statistics_ptr + offs_own, mask=mask_own, other=0.0)[:, None]
        ratio = tl.load(statistics_ptr + num_tokens + offs_own, mask=mask_own, other=0.0)[:, None]
        m_s = tl.load(statistics_ptr + 2 * num_tokens + offs_own, mask=mask_own, other=0.0)[:, None]
        inverse_s = tl.load(statistics_ptr + 3 * num_tokens + offs_own, mask=mask_own, other=0.0)[:, None]
    d_own = tl.zeros([BLOCK_OWN, BLOCK_COLUMNS], tl.float32)

    for start in tl.range(0, length, BLOCK_OTHER, num_stages=NUM_STAGES):
        offs_other = start + tl.arange(0, BLOCK_OTHER).to(tl.int64)
        mask_other = offs_other < length
        other_s = tl.load(
            other_s_ptr + offs_other[:, None] * stride_s_n + offs_d_s[None, :],
            mask=mask_other[:, None] & mask_d_s,
            other=0.0,
        )  # (other, D_s), of wide heads some columns of it
        if WIDE:
            a = chunked_logits(
                own_t_ptr, other_t_ptr, stride_t_n, offs_own, offs_other, mask_own, mask_other, HEAD_DIM_T, PRECISION_T
            )
            b = chunked_logits(
                own_s_ptr, other_s_ptr, stride_s_n, offs_own, offs_other, mask_own, mask_other, HEAD_DIM_S, PRECISION_S
            )
            a *= bits_t  # (own, other)
            b *= bits_s
        else:
            other_t = tl.load(
                other_t_ptr + offs_other[:, None] * stride_t_n + offs_d_t[None, :],
                mask=mask_other[:, None] & mask_d_t,
                other=0.0,
            )  # (other, D_t)
            a = tl.dot(own_t, tl.trans(other_t), input_precision=PRECISION_T) * bits_t  # (own, other)
            b = tl.dot(own_s, tl.trans(other_s), input_precision=PRECISION_S) * bits_s
        if OWN_KEYS:
            # Queries beyond the length have an inverse of 0, which makes their gradient 0.
            m_t = tl.load(statistics_ptr + offs_other, mask=mask_other, other=0.0)[None, :]
            ratio = tl.load(statistics_ptr + num_tokens + offs_other, mask=mask_other, other=0.0)[None, :]
            m_s = tl.load(statistics_ptr + 2 * num_tokens + offs_other, mask=mask_other, other=0.0)[None, :]
            inverse_s = tl.load(statistics_ptr + 3 * num_tokens + offs_other, mask=mask_other, other=0.0)[None, :]
            if weights_ptr is not None:
                inverse_s *= tl.load(weights_ptr + offs_other, mask=mask_other, other=0.0)[None, :]
            a = tl.where(mask_own[:, None], a, MASKED)
            b = tl.where(mask_own[:, None], b, MASKED)
        else:
            a = tl.where(mask_other[None, :], a, MASKED)
            b = tl.where(mask_other[None, :], b, MASKED)
        d_logits = (exp2(b - m_s, PTX) - exp2(a - m_t, PTX) * ratio) * inverse_s
        d_own = tl.dot((d_logits * GAIN).to(other_s.dtype), other_s, d_own, input_precision=PRECISION_S)

    d_own *= scale_d
    if weights_ptr is not None and not OWN_KEYS:
        d_own *= tl.load(weights_ptr + offs_own, mask=mask_own, other=0.0)[:, None]
    mask = (offs_own < num_tokens)[:, None] & mask_d_s
    d_own_ptrs = d_own_ptr + offs_own[:, None] * stride_d_n + offs_d_s[None, :]
    if OWN_KEYS and d_x_ptr is not None and own_p == other_p:  # one tensor's gradient: dX is already there
        d_own += tl.load(d_own_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(d_own_ptrs, d_own.to(d_own_ptr.dtype.element_ty), mask=mask)


def launches(operands: Operands, tile: TiledTile) -> tuple[Tensor | None, list[Launch]]:
    """The launches, and where they leave the row losses: (relations, B, H, N) in fp32, or None with row weights.

    Gradients go where `operands` has room for them. Memory: five numbers per row, no map.
    """
    num_images, num_heads, num_tokens, _ = operands.x_s.shape
    num_programs = num_images * len(operands.relations) * num_heads
    grid = num_programs, triton.cdiv(num_tokens, tile.block_queries)
    head_dim_s, head_dim_t = operands.x_s.shape[3], operands.x_t.shape[3]
    wide = max(head_dim_s, head_dim_t) > WHOLE_WIDTH
    num_columns = min(padded(head_dim_s), GRADIENT_BYTES // operands.x_s.element_size()) if wide else padded(head_dim_s)
    gradient_grid = (*grid, triton.cdiv(head_dim_s, num_columns)) if wide else grid
    rows = operands.empty_rows()
    own_keys = [keys for keys, place in ((False, operands.d_x), (True, operands.d_y)) if place is not None]
    arguments = {
        **operands.arguments(),
        "rows_ptr": rows,
        "statistics_ptr": torch.empty(num_programs, 4, num_tokens, device=operands.x_s.device) if own_keys else None,
        "BLOCK_QUERIES": tile.block_queries,
        "BLOCK_KEYS": tile.block_keys,
        "BLOCK_OWN": tile.block_queries,
        "BLOCK_OTHER": tile.block_keys,
        "NUM_STAGES": tile.num_stages,
        "WIDE": wide,
        "BLOCK_COLUMNS": num_columns,
    }
    return None if rows is None else rows.transpose(0, 1), [
        launch(statistics_kernel, grid, arguments, tile.num_warps),
        *(launch(gradient_kernel, gradient_grid, {**arguments, "OWN_KEYS": keys}, tile.num_warps) for keys in own_keys),
    ]
