"""What the relation losses cannot avoid, and how fast a GPU can do it: the roofs of relation_loss.py.

python benchmarks/roofs.py      # prints the floors of NOTES.md; needs no GPU

Per image and head, with N tokens, head widths D_s and D_t, and `itemsize` bytes a number:

    bytes          reads: p N (D_s + D_t), and for the gradient writes p N D_s; p is 2 for QK, 1 for VV, QQ and KK
    FLOP           2 N^2 (D_s + D_t) for both maps of logits, and 4 N^2 D_s more for dX and dY
    exponentials   2 N^2, one a logit of either side
    instructions   of a lane, 11 n^2, and 3 n^2 more for the gradient, with n = N padded to tiles of 16

A relation takes at least as long as the slowest of the four; the floor of several is the sum of theirs, as if they ran
one after another. Not counted: row losses, logarithms, and the product with the upstream gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

import harness

# An estimate: the arithmetic counts 10.75 with the gradient (NOTES.md), reductions, addresses and stores the rest.
FORWARD_INSTRUCTIONS, BACKWARD_INSTRUCTIONS = 11, 3
TILE = 16
# CUDA C++ programming guide, arithmetic throughput, compute capabilities 8.0 to 10.0: results per clock and SM of ex2;
# four schedulers of one warp instruction per clock.
EXPS_PER_CLOCK, LANES_PER_CLOCK = 16, 128


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One point: sizes, and the bytes of a number in the inputs and the gradient."""

    batch_size: int
    num_heads: int
    num_tokens: int
    head_dim_s: int
    head_dim_t: int
    itemsize: int


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one or more relations need, over all images and heads."""

    num_bytes: int
    flop: int
    exps: int
    instructions: int  # of one lane


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How much a GPU does in a second; infinite where it is not known, which leaves that roof out."""

    bytes_per_s: float
    flop_per_s: float
    exps_per_s: float
    instructions_per_s: float

    @classmethod
    def of(cls, *, gb_per_s: float, tflop_per_s: float, num_sms: int, clock_mhz: float | None) -> Rates:
        """From measured copies and products, and the clock, where it is known."""
        clocks = num_sms * clock_mhz * 1e6 if clock_mhz else math.inf
        return cls(
            bytes_per_s=gb_per_s * 1e9,
            flop_per_s=tflop_per_s * 1e12,
            exps_per_s=EXPS_PER_CLOCK * clocks,
            instructions_per_s=LANES_PER_CLOCK * clocks,
        )


# Boost clocks by a part of torch.cuda.get_device_name, as commonly quoted, not checked against the vendor's sheets; a
# GPU that is not here brings its own. Copies and products are measured in the run.
BOOST_MHZ = {
    "NVIDIA H200": 1980,
    "H100 PCIe": 1755,
    "H100 80GB HBM3": 1980,
    "A100-SXM4-80GB": 1410,
    "A100-SXM4-40GB": 1410,
    "RTX 4090": 2520,
    "RTX 3090": 1695,
}

# For predictions made without a GPU: what an H200 is taken to reach at copies and products, at a clock under load.
H200_UNDER_LOAD = Rates.of(gb_per_s=4300, tflop_per_s=790, num_sms=132, clock_mhz=1750)


def work(relation: str, shape: Shape, *, backward: bool) -> Work:
    """Bytes, FLOP, exponentials and instructions of one relation; formulas at the head of this file."""
    heads, tokens = shape.batch_size * shape.num_heads, shape.num_tokens
    projections = len(set(relation))
    numbers = projections * tokens * (shape.head_dim_s + shape.head_dim_t + backward * shape.head_dim_s)
    padded = math.ceil(tokens / TILE) * TILE
    return Work(
        num_bytes=heads * numbers * shape.itemsize,
        flop=heads * 2 * tokens**2 * (shape.head_dim_s + shape.head_dim_t + backward * 2 * shape.head_dim_s),
        exps=heads * 2 * tokens**2,
        instructions=heads * (FORWARD_INSTRUCTIONS + backward * BACKWARD_INSTRUCTIONS) * padded**2,
    )


def total(relations: Sequence[str], shape: Shape, *, backward: bool) -> Work:
    """The work of all relations together."""
    works = [work(relation, shape, backward=backward) for relation in relations]
    fields = Work.__dataclass_fields__
    return Work(**{name: sum(getattr(one, name) for one in works) for name in fields})


def times_ms(needed: Work, rates: Rates) -> dict[str, float]:
    """How long each unit is busy with the work at its full rate."""
    return {
        "bytes": 1e3 * needed.num_bytes / rates.bytes_per_s,
        "matrix unit": 1e3 * needed.flop / rates.flop_per_s,
        "exponentials": 1e3 * needed.exps / rates.exps_per_s,
        "instructions": 1e3 * needed.instructions / rates.instructions_per_s,
    }


def floor_ms(relations: Sequence[str], shape: Shape, rates: Rates, *, backward: bool) -> float:
    """Sum over the relations of the time of the slowest unit."""
    return sum(max(times_ms(work(relation, shape, backward=backward), rates).values()) for relation in relations)


def measured_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Copy and matrix product as measured now; exponentials and instructions from SMs and clock."""
    properties = torch.cuda.get_device_properties(device)
    clocks = (mhz for name, mhz in BOOST_MHZ.items() if name in properties.name)
    clock_mhz = next(clocks, getattr(properties, "clock_rate", 0) / 1e3)
    if torch.version.hip is not None:
        clock_mhz = None  # its units per clock are others
    return Rates.of(
        gb_per_s=copy_gb_per_s(device),
        tflop_per_s=matmul_tflop_per_s(device, dtype),
        num_sms=properties.multi_processor_count,
        clock_mhz=clock_mhz,
    )


@cache
def copy_gb_per_s(device: torch.device, num_bytes: int = 2**30) -> float:
    """Read plus written bytes of the best of several copies of a buffer that no cache holds."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / best_seconds(lambda: target.copy_(source), device) / 1e9


@cache
def matmul_tflop_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """The best of several square matrix products; fp32 in the precision that torch is set to."""
    size = 8192 if device.type == "cuda" else 1024
    x, y = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / best_seconds(lambda: x @ y, device) / 1e12


def best_seconds(step: Callable[[], object], device: torch.device, num_repeats: int = 20) -> float:
    """Shortest time of a step."""
    return min(harness.timed("", step, 1, device) for _ in range(num_repeats + 1)) / 1e3


def describe(rates: Rates, dtype: torch.dtype) -> str:
    """One line: what was measured."""
    name = str(dtype).removeprefix("torch.")
    parts = [f"copy {rates.bytes_per_s / 1e9:.0f} GB/s", f"{name} products {rates.flop_per_s / 1e12:.0f} TFLOP/s"]
    if math.isfinite(rates.exps_per_s):
        parts.append(f"exponentials {rates.exps_per_s / 1e12:.2f} T/s (16 per clock and SM at boost clock)")
    return "roofs measured now: " + "; ".join(parts)


def main() -> None:
    """The table of NOTES.md."""
    print("QK+VV, loss and gradient, B=256, H=12, N=197, D_t=64, bf16; microseconds")
    print(f"{'D_s':>4}{'bytes':>8}{'matrix unit':>13}{'exponentials':>14}{'instructions':>14}{'floor':>7}")
    for head_dim_s in (16, 32, 64):
        shape = Shape(batch_size=256, num_heads=12, num_tokens=197, head_dim_s=head_dim_s, head_dim_t=64, itemsize=2)
        both = ("qk", "vv")
        times = times_ms(total(both, shape, backward=True), H200_UNDER_LOAD).values()
        floor = floor_ms(both, shape, H200_UNDER_LOAD, backward=True)
        figures = [f"{1e3 * ms:.0f}" for ms in (*times, floor)]
        print(f"{head_dim_s:>4}" + "".join(f"{f:>{w}}" for f, w in zip(figures, (8, 13, 14, 14, 7))))


if __name__ == "__main__":
    main()
