"""How far the simulation of latency.py is from times that were measured.

python benchmarks/latency_check.py

Without a GPU: a Triton attention forward in the form of Triton's tutorial (queries resident, keys and values pass by in
a pipelined loop, online softmax), simulated for the tiles that the tutorial tries, against published times of that
tutorial on an H100. On an H100 or H200 the same kernel and the relation kernels are timed as well, and each
prints measured over simulated: the factor by which to read the simulated times of NOTES.md.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

import sass
from aot_report import TARGETS, compile_launch, operands
from latency import clocks_per_block, microseconds
from sm_model import GPUS, MIDDLE, OPTIMISTIC, PESSIMISTIC
from tinymim_fast.kernels import tiles, triton_backend
from tinymim_fast.kernels.operands import Launch

NUM_IMAGES, NUM_HEADS, NUM_TOKENS, HEAD_DIM = 4, 32, 4096, 128
# TFLOP/s of the tutorial, not causal, fp16, H100, at NUM_TOKENS and HEAD_DIM, and where they stand.
PUBLISHED = {
    "github.com/pytorch/benchmark pull 2391 (batch 4, 16 heads)": 458.4,
    "github.com/facebookexperimental/triton pull 206 (batch 4, 32 heads)": 459.6,
    "github.com/pytorch/benchmark pull 2296 (batch 128, 8 heads)": 404.7,
}


@dataclass(frozen=True)
class AttentionTile:
    """A block of queries that stays, blocks of keys that pass by, and how the loop over them is launched."""

    block_queries: int
    block_keys: int
    num_warps: int
    num_stages: int


# Of the tutorial's choices those that fill an SM differently.
ATTENTION_TILES = AttentionTile(128, 128, 8, 3), AttentionTile(128, 64, 4, 3), AttentionTile(64, 64, 4, 3)


@triton.jit
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    bits,
    num_tokens,
    HEAD_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """softmax(QK^T) V for (heads, num_tokens, HEAD_DIM), contiguous; blocks divide num_tokens."""
    offset = tl.program_id(1).to(tl.int64) * num_tokens * HEAD_DIM
    offs_q = tl.program_id(0) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    offs_d = tl.arange(0, HEAD_DIM)
    offs_k = tl.arange(0, BLOCK_KEYS)
    q = tl.load(q_ptr + offset + offs_q[:, None] * HEAD_DIM + offs_d[None, :])  # (queries, D)
    row_max = tl.full([BLOCK_QUERIES], -1e30, tl.float32)
    row_sum = tl.zeros([BLOCK_QUERIES], tl.float32)
    out = tl.zeros([BLOCK_QUERIES, HEAD_DIM], tl.float32)
    k_ptrs = k_ptr + offset + offs_k[None, :] * HEAD_DIM + offs_d[:, None]
    v_ptrs = v_ptr + offset + offs_k[:, None] * HEAD_DIM + offs_d[None, :]
    for _ in tl.range(0, num_tokens, BLOCK_KEYS, num_stages=NUM_STAGES):
        logits = tl.dot(q, tl.load(k_ptrs))  # (queries, keys)
        new_max = tl.maximum(row_max, tl.max(logits, 1) * bits)
        weights = tl.exp2(logits * bits - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(weights, 1)
        v = tl.load(v_ptrs)
        out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None])
        row_max = new_max
        k_ptrs += BLOCK_KEYS * HEAD_DIM
        v_ptrs += BLOCK_KEYS * HEAD_DIM
    out_ptrs = out_ptr + offset + offs_q[:, None] * HEAD_DIM + offs_d[None, :]
    tl.store(out_ptrs, (out / row_sum[:, None]).to(out_ptr.dtype.element_ty))


def attention_launch(tile: AttentionTile, device: str) -> Launch:
    """On random inputs; on "meta" to be compiled only."""
    q, k, v, out = (
        torch.empty(NUM_IMAGES * NUM_HEADS, NUM_TOKENS, HEAD_DIM, dtype=torch.float16, device=device) for _ in range(4)
    )
    for z in (q, k, v) if device != "meta" else ():
        z.normal_()
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "out_ptr": out,
        "bits": HEAD_DIM**-0.5 * math.log2(math.e),
        "num_tokens": NUM_TOKENS,
        "HEAD_DIM": HEAD_DIM,
        "BLOCK_QUERIES": tile.block_queries,
        "BLOCK_KEYS": tile.block_keys,
        "NUM_STAGES": tile.num_stages,
    }
    grid = NUM_TOKENS // tile.block_queries, NUM_IMAGES * NUM_HEADS
    return Launch(attention_kernel, grid, arguments, tile.num_warps)


def simulated_us(launch: Launch, num_iterations: int) -> list[float]:
    """Optimistic, middle, pessimistic; of long loops two short ones tell what an iteration takes."""
    compiled = compile_launch(launch, TARGETS["sm_90"])
    code, registers = sass.disassembled(compiled.asm["cubin"])
    slots = sass.blocks_per_sm(registers, compiled.metadata.shared, launch.num_warps, GPUS["sm_90"].limits)
    few, more = min(num_iterations, 6), min(num_iterations, 12)
    times = []
    for latencies in (OPTIMISTIC, MIDDLE, PESSIMISTIC):
        clocks = [
            clocks_per_block(code, sass.executed(code, n), launch.num_warps, slots, latencies) for n in (few, more)
        ]
        an_iteration = (clocks[1] - clocks[0]) / (more - few) if more > few else 0.0
        clocks_in_all = clocks[1] + an_iteration * (num_iterations - more)
        times.append(microseconds(clocks_in_all, math.prod(launch.grid), slots))
    return times


def measured_us(make_launch) -> float | None:
    """None without an H100 or H200."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return None
    launch = make_launch()
    return 1e3 * triton.testing.do_bench(launch.run, return_mode="median")


def told(name: str, times: list[float], measured: float | None) -> str:
    """One line: simulated optimistic / middle / pessimistic, and how far the middle is off where it was measured."""
    line = f"{name}: simulated " + " / ".join(f"{us:.0f}" for us in times) + " us"
    return (
        line if measured is None else f"{line}, measured {measured:.0f} us, {measured / times[1]:.2f} times the middle"
    )


def relation_launch(head_dim_s: int, device: str) -> Launch:
    """The first launch of one relation, loss and gradient in bf16, N = 197, D_t = 64, with the shipped tile."""
    relation = operands(197, head_dim_s, 64, "bfloat16", "qk", device)
    tile = tiles.choose(triton_backend.problem(relation, arch="sm_90"))
    return triton_backend.plan(relation, tile)[1][0]


def main() -> None:
    """Prints the published, the simulated and, on a GPU that is modelled, the measured times."""
    flop = 4 * NUM_IMAGES * NUM_HEADS * NUM_TOKENS**2 * HEAD_DIM
    slowest, fastest = (flop / rate / 1e6 for rate in (min(PUBLISHED.values()), max(PUBLISHED.values())))
    print(f"attention forward of {flop / 1e12:.2f} TFLOP, published: {fastest:.0f} to {slowest:.0f} us")
    best = [math.inf] * 3
    for tile in ATTENTION_TILES:
        times = simulated_us(attention_launch(tile, "meta"), NUM_TOKENS // tile.block_keys)
        best = [min(pair) for pair in zip(best, times)]
        print(told(f"{tile}", times, measured_us(lambda tile=tile: attention_launch(tile, "cuda"))))
    print("published over simulated, fastest tile: " + " / ".join(f"{fastest / us:.2f}" for us in best))
    for head_dim_s in (16, 32, 64):
        launch = relation_launch(head_dim_s, "meta")
        times = simulated_us(launch, math.ceil(197 / launch.arguments["BLOCK_QUERIES"]))
        measured = measured_us(lambda head_dim_s=head_dim_s: relation_launch(head_dim_s, "cuda"))
        print(told(f"relation, D_s {head_dim_s}", times, measured))


if __name__ == "__main__":
    main()
