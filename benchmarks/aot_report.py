"""What the kernels compile to, without a GPU: registers, spills, shared memory, instructions, issue time.

python benchmarks/aot_report.py --output benchmarks/results/aot_report.csv

A row is one launch, for the tile that is checked in for the target, of a use of the loss (`USES`). Of the paths
through a kernel's machine code the shortest is counted, its loop as often as N asks for: the single pass's second
launch, for rows that need their maximum, counts as returning at once. Instructions and MUFU are per (query, key) pair
that the tiles hold, padding included, and per lane. issue_us is the time in which an H200 (132 SMs at 1.75 GHz)
issues them at four warp instructions per clock and SM, for B=256, H=12: a lower bound, not a timing. simulated_us is
what latency.py makes of the same path on the target's own GPU; empty where it does not know an instruction. Latencies
are Hopper's on every target: for sm_90 in three sets, elsewhere, where the figure is good for ranking alone, the middle
one. AMD code is counted statically, and has neither.
"""

import argparse
import csv
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from statistics import fmean

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

import latency
import sass
import sm_model
from sass import Instruction
from tinymim_fast.kernels import tiles, triton_backend
from tinymim_fast.kernels.operands import Launch, Operands

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NUM_IMAGES, NUM_HEADS = 256, 12
H200_ISSUE_PER_US = 132 * 4 * 1750  # warp instructions
LATENCIES = {
    "simulated_us_optimistic": sm_model.OPTIMISTIC,
    "simulated_us": sm_model.MIDDLE,
    "simulated_us_pessimistic": sm_model.PESSIMISTIC,
}
# What a kernel is compiled for: one packed relation, both as a training step has them, both with lengths, the loss
# alone, the gradient of one side, and the backward pass of reduction "none" with lengths.
USES = ("qk", "loss", "qk+vv", "forward", "d_x", "d_y", "rows")
# (N, D_s, D_t, dtype, use) that are compiled: the paper's head widths, every bucket of N, the widest heads, and for
# the tiles that fill the registers, the uses that take most of them. tf32 is fp32 with products in TF32.
SHAPES = [
    *((197, d_s, 64, "bfloat16", "qk") for d_s in (16, 32, 48, 64)),
    (197, 16, 80, "bfloat16", "qk"),
    (128, 16, 64, "bfloat16", "qk"),
    *((n, 32, 64, "bfloat16", "qk") for n in (16, 17, 50, 128, 577)),
    (577, 128, 128, "bfloat16", "qk"),
    (197, 64, 64, "float32", "qk"),
    (197, 64, 64, "tf32", "qk"),
    *((197, d_s, 64, "bfloat16", use) for d_s in (16, 32, 64) for use in ("loss", "forward")),
    *((197, 64, 64, "bfloat16", use) for use in ("d_x", "d_y")),
    *((197, d_s, 64, "float16", use) for d_s in (16, 32, 64) for use in ("qk+vv", "rows")),
    *((n, 64, 64, "float16", "qk+vv") for n in (17, 50, 128, 256)),
    *((577, 128, 128, "float16", use) for use in ("qk+vv", "rows")),
]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the report; empty where the target's tools do not tell. `triton` is the version that compiled it."""

    target: str
    num_tokens: int
    head_dim_s: int
    head_dim_t: int
    dtype: str
    use: str
    kernel: str
    block_queries: int
    block_keys: int
    num_warps: int
    registers: int
    spill_stores: int
    spill_loads: int
    shared_bytes: int
    blocks_per_sm: int | str = ""
    hgmma: int | str = ""
    hmma: int | str = ""
    tcgen05: int | str = ""
    mfma: int | str = ""
    mufu_per_element: float | str = ""
    instructions_per_element: float | str = ""
    issue_us: float | str = ""
    simulated_us_optimistic: float | str = ""
    simulated_us: float | str = ""
    simulated_us_pessimistic: float | str = ""
    triton: str = triton.__version__


def operands(num_tokens: int, head_dim_s: int, head_dim_t: int, dtype: str, use: str, device: str = "meta") -> Operands:
    """As RelationLoss launches packed projections, relation_kl the other uses; on "meta" nothing is allocated."""
    dtype = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    packed = use in ("qk", "loss", "qk+vv")
    both = use in ("loss", "qk+vv")

    def projection(head_dim: int) -> Tensor:
        if packed:
            shape = NUM_IMAGES, num_tokens, 3, NUM_HEADS, head_dim
            return torch.empty(shape, dtype=dtype, device=device)[:, :, 0].transpose(1, 2)
        return torch.empty(NUM_IMAGES, NUM_HEADS, num_tokens, head_dim, dtype=dtype, device=device)

    student, teacher, gradient = projection(head_dim_s), projection(head_dim_t), projection(head_dim_s)
    weights = torch.empty(NUM_IMAGES, NUM_HEADS, num_tokens, device=device)
    return Operands(
        x_s=student,
        y_s=student,
        x_t=teacher,
        y_t=teacher,
        d_x=None if use in ("forward", "d_y") else gradient,
        d_y=None if use in ("forward", "d_x") else gradient,
        scale_s=head_dim_s**-0.5,
        scale_t=head_dim_t**-0.5,
        lengths=torch.empty(NUM_IMAGES, dtype=torch.int64, device=device) if use in ("qk+vv", "rows") else None,
        weights=weights if use == "rows" else None,
        relations=((0, 1), (2, 2)) if both else ((0, 1),),
        stride_s_p=NUM_HEADS * head_dim_s if packed else 0,
        stride_t_p=NUM_HEADS * head_dim_t if packed else 0,
        stride_d_p=NUM_HEADS * head_dim_s if packed else 0,
    )


def compile_launch(launch: Launch, target: GPUTarget) -> CompiledKernel:
    """With the specialisation that the launch would get: 16-byte alignment, ones and None as constants."""
    pointers = {
        torch.bfloat16: "*bf16",
        torch.float16: "*fp16",
        torch.float32: "*fp32",
        torch.int32: "*i32",
        torch.int64: "*i64",
    }
    signature, constants, attributes = {}, {}, {}
    arguments = {**launch.arguments, "PTX": target.backend == "cuda"}
    for i, name in enumerate(launch.kernel.arg_names):
        value = arguments[name]
        if name.isupper() or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], attributes[(i,)] = pointers[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options={"num_warps": launch.num_warps})


def simulated_us(target: str, launch: Launch, code: list[Instruction], blocks: int, traces: list[list[int]]) -> dict:
    """By the simulation's latencies, of programs that take the traces in equal parts; empty if not modelled."""
    gpu, figures = sm_model.GPUS[target], {}
    for name, latencies in LATENCIES.items():
        if target != "sm_90" and latencies is not sm_model.MIDDLE:
            continue
        try:
            clocks = [
                latency.clocks_per_block(code, trace, launch.num_warps, blocks, latencies, gpu) for trace in traces
            ]
        except sm_model.NotModelled:
            return {}
        figures[name] = round(latency.microseconds(fmean(clocks), math.prod(launch.grid), blocks, gpu), 1)
    return figures


def nvidia_row(
    target: str, launch: Launch, compiled: CompiledKernel, num_tokens: int, with_itself: bool = False
) -> dict:
    """Figures of a cubin, static ones and those of the path that is executed."""
    code, registers = sass.disassembled(compiled.asm["cubin"])
    arguments = launch.arguments
    own, other = block_sizes(arguments)
    # The single pass loops over queries and keeps the keys; the tiled kernels loop over `other`.
    resident, looped = (arguments["LIVE_KEYS"], own) if "LIVE_KEYS" in arguments else (own, other)
    num_iterations = math.ceil(num_tokens / looped)
    returns_at_once = bool(arguments.get("EXACT")) and arguments["flags_ptr"] is not None
    # Of two relations, that of v with itself has a longer way out.
    traces = [
        sass.executed(code, num_iterations, returns_at_once, long_way_out)
        for long_way_out in ((False, True) if with_itself and not returns_at_once else (False,))
    ]
    counts = Counter(code[i].opcode for i in traces[0])
    in_loop = Counter(code[i].opcode for i in sass.executed(code, num_iterations))
    blocks = sass.blocks_per_sm(registers, compiled.metadata.shared, launch.num_warps, sm_model.GPUS[target].limits)
    lanes = 32 * launch.num_warps
    elements = resident * looped * num_iterations / lanes
    num_programs = math.prod(launch.grid)

    def static(prefix: str) -> int:
        return sum(instruction.opcode.startswith(prefix) for instruction in code)

    def per_element(prefix: str) -> float:
        return round(sum(n for opcode, n in in_loop.items() if opcode.startswith(prefix)) / elements, 3)

    return {
        "registers": registers,
        "spill_stores": static("STL"),
        "spill_loads": static("LDL"),
        "shared_bytes": compiled.metadata.shared,
        "blocks_per_sm": blocks,
        "hgmma": static("HGMMA"),
        "hmma": static("HMMA"),
        "tcgen05": static("UTCHMMA") + static("UTCMMA"),
        "mufu_per_element": per_element("MUFU"),
        "instructions_per_element": round(per_element(""), 1),
        "issue_us": round(sum(counts.values()) * launch.num_warps * num_programs / H200_ISSUE_PER_US, 1),
        **simulated_us(target, launch, code, blocks, traces),
    }


def amd_row(compiled: CompiledKernel) -> dict:
    """Figures that the assembly states."""
    assembly = compiled.asm["amdgcn"]

    def value(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    return {
        "registers": value("vgpr_count"),
        "spill_stores": value("vgpr_spill_count"),
        "spill_loads": value("vgpr_spill_count"),
        "shared_bytes": compiled.metadata.shared,
        "mfma": len(re.findall(r"v_mfma", assembly)),
    }


def block_sizes(arguments: dict) -> tuple[int, int]:
    """Queries and keys of a tile; of the tiled gradient, own rows and others."""
    if "BLOCK_OWN" in arguments:
        return arguments["BLOCK_OWN"], arguments["BLOCK_OTHER"]
    return arguments["BLOCK_QUERIES"], arguments["BLOCK_KEYS"]


def name_of(launch: Launch) -> str:
    """The kernel, with what of its flags makes it another one."""
    name = launch.kernel.__name__.removesuffix("_kernel")
    if name == "single_pass":
        return name + ("_exact" if launch.arguments["EXACT"] else "")
    if name == "gradient":
        return "tiled_" + ("d_y" if launch.arguments["OWN_KEYS"] else "d_x")
    return "tiled_" + name


def rows_of(target: str, shape: tuple[int, int, int, str, str]) -> list[Row]:
    """A row for each launch of a problem."""
    num_tokens, head_dim_s, head_dim_t, dtype, use = shape
    relation = operands(*shape)
    _, launches = triton_backend.plan(relation, tiles.choose(triton_backend.problem(relation, arch=target)))
    rows = []
    for launch in launches:
        if dtype == "tf32":
            launch.arguments.update(PRECISION_S="tf32", PRECISION_T="tf32")
        compiled = compile_launch(launch, TARGETS[target])
        hip = TARGETS[target].backend == "hip"
        figures = (
            amd_row(compiled) if hip else nvidia_row(target, launch, compiled, num_tokens, use in ("loss", "qk+vv"))
        )
        block_queries, block_keys = block_sizes(launch.arguments)
        rows.append(
            Row(
                target=target,
                num_tokens=num_tokens,
                head_dim_s=head_dim_s,
                head_dim_t=head_dim_t,
                dtype=dtype,
                use=use,
                kernel=name_of(launch),
                block_queries=block_queries,
                block_keys=block_keys,
                num_warps=launch.num_warps,
                **figures,
            )
        )
    return rows


def report(targets: list[str], num_tokens: list[int] | None = None, dtypes: list[str] | None = None) -> Iterator[Row]:
    """The rows, in order, compiled in parallel; of some numbers of tokens and dtypes only, where these are given."""
    shapes = [s for s in SHAPES if s[0] in (num_tokens or [s[0]]) and s[3] in (dtypes or [s[3]])]
    with ProcessPoolExecutor() as pool:
        for rows in pool.map(rows_of, *zip(*product(targets, shapes))):
            yield from rows


def parse_args() -> argparse.Namespace:
    """Flags."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--num-tokens", nargs="+", type=int, help="rows of these numbers of tokens only")
    parser.add_argument("--dtypes", nargs="+", help="rows of these dtypes only")
    parser.add_argument("--output", type=Path, help="CSV; standard output if not given")
    return parser.parse_args()


def main() -> None:
    """Write the report."""
    args = parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET: got 1, want it unset: interpreted kernels are not compiled")
    with args.output.open("w", newline="") if args.output else sys.stdout as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in report(args.targets, args.num_tokens, args.dtypes):
            writer.writerow(asdict(row))
            file.flush()


if __name__ == "__main__":
    main()
