"""Triton: the row losses and the gradient in one pass over the logits, for up to 256 tokens.

One program per (image, relation, head). All keys stay on the chip and queries pass by in blocks, so a block sees
whole rows of the relations. In bits,

    a = scale_t * log2(e) * X_t Y_t^T        e_t = 2^a        l_t = sum over keys of e_t       (b, e_s, l_s alike)
    row = ln 2 * (sum of e_t (a - b) / l_t - log2 l_t + log2 l_s)
    dS  = (e_s - e_t l_s / l_t) / l_s        taken in fp32, before any rounding
    dX  = scale_d * dS Y_s,  dY = scale_d * dS^T X_s          where x is y, their sum

No row maximum is subtracted: it would cost a fifth of all instructions. The sums tell whether that was sound.
Within 2^-60 and 2^60 nothing overflowed and what underflowed is below 2^-58 of the row; a program that sees another
sum raises a flag, and a second launch with EXACT computes its rows with their maxima. Its programs look through
several flags each, and most return at once.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinymim_fast.kernels.device_math import (
    FIRST_PROGRAMS,
    LN_2,
    MASKED,
    exp2,
    gain,
    locate,
    log2,
    padded,
    reciprocal,
    stagger,
    valid_tokens,
)
from tinymim_fast.kernels.operands import Launch, Operands, launch
from tinymim_fast.kernels.tiles import SinglePassTile

LARGEST_SUM = tl.constexpr(2.0**60)
# What a key that is not there adds to a sum: unlike 0.0, x + -0.0 is x for every x, and the compiler drops it.
NOTHING = tl.constexpr(-0.0)

# From here on a program of the second launch looks through several flags: starting one takes longer than that.
MANY_PROGRAMS = 2048


@triton.jit
def load_rows(ptr, stride_n, rows, length, HEAD_DIM: tl.constexpr):
    """(rows, D) of a head, 0 where there is no token and no column."""
    offs_d = tl.arange(0, padded(HEAD_DIM))
    mask = (rows < length)[:, None] & (offs_d < HEAD_DIM)[None, :]
    return tl.load(ptr + rows[:, None] * stride_n + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def single_pass_kernel(
    x_s_ptr,
    y_s_ptr,
    x_t_ptr,
    y_t_ptr,
    d_x_ptr,
    d_y_ptr,
    rows_ptr,
    flags_ptr,
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
    BLOCK_KEYS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    LIVE_KEYS: tl.constexpr,
    KEY_GROUPS: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    STAGGERED: tl.constexpr,
    MAPS: tl.constexpr,
    PRECISION_S: tl.constexpr,
    PRECISION_T: tl.constexpr,
    PTX: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Row losses, dX and dY of one (image, relation, head): the formulas at the head of this file.

    Each where it has a place. With `weights`, row i of dS is multiplied by weights[i] * weight_scales.
    """
    first = tl.program_id(0)
    if EXACT and flags_ptr is not None:  # noqa: SIM102
        # Decided when compiled. A program's maps lie apart: an image seldom has one flag alone.
        if tl.max(tl.load(flags_ptr + first + tl.arange(0, MAPS) * tl.num_programs(0)), 0) == 0:
            return
    if STAGGERED:
        stagger(first, PTX)
    for turn in range(MAPS):
        pid = first + turn * tl.num_programs(0)
        wanted = 1
        if EXACT and flags_ptr is not None:
            wanted = tl.load(flags_ptr + pid)
        if wanted != 0:
            # Unknown to the compiler, which would keep the rows' offsets from turn to turn, and spill.
            nothing = wanted - 1
            image, head, x_p, y_p = locate(pid, num_heads, num_relations, projections)
            length = valid_tokens(lengths_ptr, image, num_tokens)
            x_s_head = x_s_ptr + image * stride_s_b + head * stride_s_h + x_p * stride_s_p
            y_s_head = y_s_ptr + image * stride_s_b + head * stride_s_h + y_p * stride_s_p
            x_t_head = x_t_ptr + image * stride_t_b + head * stride_t_h + x_p * stride_t_p
            y_t_head = y_t_ptr + image * stride_t_b + head * stride_t_h + y_p * stride_t_p
            first_row = pid.to(tl.int64) * num_tokens

            # A map's columns take the keys eight by eight from group to group of warps, so that which keys lie beyond
            # LIVE_KEYS depends on the register alone: the compiler drops their exponentials and sums.
            column = tl.arange(0, BLOCK_KEYS)
            GROUP: tl.constexpr = BLOCK_KEYS // KEY_GROUPS
            offs_k = column % GROUP // 8 * (8 * KEY_GROUPS) + column // GROUP * 8 + column % 8
            live = (offs_k < LIVE_KEYS)[None, :]
            counts = (offs_k < LIVE_KEYS - 16) | (offs_k + nothing < num_tokens)  # the former is known to the compiler
            keys = offs_k + nothing

            if AHEAD:  # the first block of queries; the others are read behind the exponentials of the one before
                x_t = load_rows(x_t_head, stride_t_n, tl.arange(0, BLOCK_QUERIES), length, HEAD_DIM_T)
                x_s = load_rows(x_s_head, stride_s_n, tl.arange(0, BLOCK_QUERIES), length, HEAD_DIM_S)
            y_s = load_rows(y_s_head, stride_s_n, keys, length, HEAD_DIM_S)  # (keys, D_s)
            y_t = load_rows(y_t_head, stride_t_n, keys, length, HEAD_DIM_T)  # (keys, D_t)
            BLOCK_D_S: tl.constexpr = padded(HEAD_DIM_S)
            offs_d_s = tl.arange(0, BLOCK_D_S)
            mask_d_s = (offs_d_s < HEAD_DIM_S)[None, :]
            GAIN: tl.constexpr = gain(y_s.dtype)
            factor_d = scale_d * (1.0 / GAIN)
            if weight_scales_ptr is not None:
                factor_d *= tl.load(weight_scales_ptr + pid)
            if d_x_ptr is not None:
                d_x_head = d_x_ptr + image * stride_d_b + head * stride_d_h + x_p * stride_d_p
            if d_y_ptr is not None:
                d_y_head = d_y_ptr + image * stride_d_b + head * stride_d_h + y_p * stride_d_p
                # (D_s, keys) or (keys, D_s)
                d_y = tl.zeros([BLOCK_D_S, BLOCK_KEYS] if TRANSPOSED else [BLOCK_KEYS, BLOCK_D_S], tl.float32)
            if not EXACT:
                out_of_range = tl.zeros([BLOCK_QUERIES], tl.int32)

            for start in tl.range(nothing, num_tokens, BLOCK_QUERIES, num_stages=NUM_STAGES):
                offs_q = start + tl.arange(0, BLOCK_QUERIES)
                in_image = offs_q < num_tokens
                if not AHEAD:
                    x_t = load_rows(x_t_head, stride_t_n, offs_q, length, HEAD_DIM_T)  # (queries, D_t)
                    x_s = load_rows(x_s_head, stride_s_n, offs_q, length, HEAD_DIM_S)  # (queries, D_s)
                d_logits = tl.zeros([BLOCK_QUERIES, BLOCK_KEYS], y_s.dtype)
                # Always so. Where it sees one product feed another, Triton puts all warps along the queries. If there
                # are too many for that, half of them repeat the work of the others (sm_90: 400 spills and twice the
                # exponentials), and the branch hides it; if not, a warp holds whole rows: no sum crosses warps, and
                # dX takes dS from registers.
                if WHOLE_ROWS or start < num_tokens:
                    if lengths_ptr is not None:
                        # Read again for each block: kept, the masks of a thread's keys would take 26 registers. With
                        # no valid token, one key of zeros counts: losses and gradients come out 0, not NaN.
                        counts = offs_k < tl.maximum(valid_tokens(lengths_ptr, image, num_tokens), 1)
                    bias = tl.where(counts, 0.0, MASKED)[None, :]  # added by the instruction that scales the logits
                    a = tl.dot(x_t, tl.trans(y_t), input_precision=PRECISION_T) * bits_t + bias  # (queries, keys)
                    b = tl.dot(x_s, tl.trans(y_s), input_precision=PRECISION_S) * bits_s + bias
                    if EXACT:
                        a -= tl.max(tl.where(live, a, MASKED), 1)[:, None]
                        b -= tl.max(tl.where(live, b, MASKED), 1)[:, None]
                    e_t = exp2(a, PTX)
                    e_s = exp2(b, PTX)
                    if rows_ptr is not None:  # before the other sums, which have no use for the logits
                        weighted = tl.sum(tl.where(live, e_t * (a - b), NOTHING), 1)
                    l_t = tl.sum(tl.where(live, e_t, NOTHING), 1)
                    l_s = tl.sum(tl.where(live, e_s, NOTHING), 1)
                    if not EXACT:
                        out_of_range |= tl.maximum(l_t, l_s) > LARGEST_SUM
                        out_of_range |= tl.minimum(l_t, l_s) * LARGEST_SUM < 1.0
                    inverse_t = reciprocal(l_t, PTX)
                    if rows_ptr is not None:
                        row = (weighted * inverse_t - log2(l_t, PTX) + log2(l_s, PTX)) * LN_2
                        tl.store(rows_ptr + first_row + offs_q, row, mask=in_image)
                    if d_x_ptr is not None or d_y_ptr is not None:
                        factor = reciprocal(l_s, PTX) * GAIN
                        if weights_ptr is not None:
                            factor *= tl.load(weights_ptr + first_row + offs_q, mask=in_image, other=0.0)
                        # Of equal relations exactly 1, whatever the reciprocal's error: their gradient is exactly 0.
                        ratio = tl.where(l_s == l_t, 1.0, l_s * inverse_t)
                        d_logits = (e_s - e_t * ratio[:, None]) * factor[:, None]
                        d_logits = tl.where(live, d_logits, 0.0).to(y_s.dtype)  # (queries, keys)
                if d_x_ptr is not None:
                    d_x = tl.dot(d_logits, y_s, input_precision=PRECISION_S) * factor_d  # (queries, D_s)
                    tl.store(
                        d_x_head + offs_q[:, None] * stride_d_n + offs_d_s[None, :],
                        d_x.to(d_x_ptr.dtype.element_ty),
                        mask=in_image[:, None] & mask_d_s,
                    )
                if AHEAD:  # here, where registers are free and the other product can hide the wait
                    next_t = load_rows(x_t_head, stride_t_n, offs_q + BLOCK_QUERIES, length, HEAD_DIM_T)
                    next_s = load_rows(x_s_head, stride_s_n, offs_q + BLOCK_QUERIES, length, HEAD_DIM_S)
                if d_y_ptr is not None:
                    if TRANSPOSED:
                        d_y = tl.dot(tl.trans(x_s), d_logits, d_y, input_precision=PRECISION_S)
                    else:
                        d_y = tl.dot(tl.trans(d_logits), x_s, d_y, input_precision=PRECISION_S)
                if AHEAD:
                    x_t, x_s = next_t, next_s

            if d_y_ptr is not None:
                d_y_ptrs = d_y_head + keys[:, None] * stride_d_n + offs_d_s[None, :]
                mask = (keys < num_tokens)[:, None] & mask_d_s
                d_y = (tl.trans(d_y) if TRANSPOSED else d_y) * factor_d
                if d_x_ptr is not None and x_p == y_p:  # one tensor's gradient: dX is already there
                    # Written by other threads of this program. PTX has bar.sync, which orders memory within the block,
                    # between the st.global above and this ld.global, which is none of the incoherent .nc kind.
                    tl.debug_barrier()
                    d_y += tl.load(d_y_ptrs, mask=mask, other=0.0).to(tl.float32)
                tl.store(d_y_ptrs, d_y.to(d_y_ptr.dtype.element_ty), mask=mask)
            if not EXACT:
                tl.store(flags_ptr + pid, tl.max(out_of_range, 0))


def launches(operands: Operands, tile: SinglePassTile) -> tuple[Tensor | None, list[Launch]]:
    """The launches, and where they leave the row losses: (relations, B, H, N) in fp32, or None with row weights.

    Gradients go where `operands` has room for them. Memory: a number per row and a flag per head, no map.
    """
    num_images, num_heads, num_tokens, _ = operands.x_s.shape
    block_keys = padded(num_tokens)
    num_programs = num_images * len(operands.relations) * num_heads
    rows = operands.empty_rows()
    # Rows this short gain nothing, and with their maxima a single key has a loss and a gradient of exactly 0.
    always_exact = block_keys == 16
    flags = None if always_exact else torch.empty(num_programs, dtype=torch.int32, device=operands.x_s.device)
    whole_rows = block_keys >= 128 and 16 * tile.num_warps <= tile.block_queries
    arguments = {
        **operands.arguments(),
        "rows_ptr": rows,
        "flags_ptr": flags,
        "BLOCK_KEYS": block_keys,
        "BLOCK_QUERIES": tile.block_queries,
        "LIVE_KEYS": triton.cdiv(num_tokens, 16) * 16,
        "KEY_GROUPS": tile.key_groups,
        # Shorter rows leave room for more blocks on an SM, which hide more than whole rows save.
        "WHOLE_ROWS": whole_rows,
        # Where D_s fills the M axis of a wgmma, so that dS^T need not be turned on its way to the matrix unit.
        "TRANSPOSED": tile.key_groups > 1 and padded(operands.x_s.shape[3]) == 64,
        "NUM_STAGES": tile.num_stages,
        "AHEAD": tile.ahead,
        "STAGGERED": tile.staggered and num_programs > 2 * FIRST_PROGRAMS,
        "MAPS": 1,
        "EXACT": always_exact,
    }
    plan = [launch(single_pass_kernel, (num_programs,), arguments, tile.num_warps)]
    if not always_exact:
        maps = math.gcd(num_programs, 8) if num_programs >= MANY_PROGRAMS else 1
        exact = {**arguments, "AHEAD": False, "STAGGERED": False, "MAPS": maps, "EXACT": True}
        if whole_rows:  # halves, for whole rows within a loop over maps spill
            exact |= {"WHOLE_ROWS": False, "KEY_GROUPS": 2}
        warps = 2 * tile.num_warps if whole_rows else tile.num_warps
        plan.append(launch(single_pass_kernel, (num_programs // maps,), exact, warps))
    return None if rows is None else rows.transpose(0, 1), plan
