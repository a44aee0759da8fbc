"""Times every candidate tile on the GPU at hand and prints the lines to check in, for kernels/tiles.py.

python benchmarks/tune_tiles.py --num-tokens 50 197 577 --head-dims 16x64 32x64 64x64
python benchmarks/tune_tiles.py --crossover

With --crossover, the default single pass beside the default tiled kernels instead: up to which N the single pass wins.

A candidate that does not compile, or whose gradient is wrong, is named and left out. Runs on demand only: training
never tunes.
"""

import argparse
import sys
from functools import partial

import torch
import triton

import harness
from tinymim_fast.kernels import chunked, tiles, triton_backend
from tinymim_fast.kernels.operands import Operands


def problem_operands(args: argparse.Namespace, num_tokens: int, head_dim_s: int, head_dim_t: int) -> Operands:
    """Standard normal tensors of one problem, with places for both gradients."""
    dtype = getattr(torch, args.dtype)
    x_s, y_s, x_t, y_t = (
        torch.randn(args.batch_size, args.num_heads, num_tokens, width, device="cuda").to(dtype)
        for width in (head_dim_s, head_dim_s, head_dim_t, head_dim_t)
    )
    return Operands(
        x_s=x_s,
        y_s=y_s,
        x_t=x_t,
        y_t=y_t,
        d_x=torch.empty_like(x_s),
        d_y=torch.empty_like(y_s),
        scale_s=head_dim_s**-0.5,
        scale_t=head_dim_t**-0.5,
    )


def is_right(operands: Operands, tile: triton_backend.Tile) -> bool:
    """Against the chunked backend, which the tests hold against the formula in fp64."""
    operands.d_x.fill_(torch.nan)
    operands.d_y.fill_(torch.nan)
    rows = triton_backend.run(operands, tile)[0]
    d_x, d_y = torch.empty_like(operands.d_x), torch.empty_like(operands.d_y)
    expected = chunked.relation_kl(
        operands.x_s,
        operands.y_s,
        operands.x_t,
        operands.y_t,
        scale_s=operands.scale_s,
        scale_t=operands.scale_t,
        d_x=d_x,
        d_y=d_y,
    )
    floor = harness.FLOORS[operands.x_s.dtype]
    pairs = (rows, expected), (operands.d_x, d_x), (operands.d_y, d_y)
    return all(harness.relative_error(ours, theirs.double()) <= 2 * floor for ours, theirs in pairs)


def crossover(args: argparse.Namespace, head_dim_s: int, head_dim_t: int) -> None:
    """Print both kernels' times by N."""
    for num_tokens in range(64, 257, 32):
        operands = problem_operands(args, num_tokens, head_dim_s, head_dim_t)
        problem = triton_backend.problem(operands)
        step_ms = {}
        for tile in (tiles.default(problem), tiles.default_tiled(problem)):
            if not is_right(operands, tile):
                sys.exit(f"wrong: {tile}")
            step = partial(triton_backend.run, operands, tile)
            step_ms[type(tile).__name__] = triton.testing.do_bench(step, return_mode="median")
        times = ", ".join(f"{kernel} {1e3 * ms:.0f} us" for kernel, ms in step_ms.items())
        print(f"N={num_tokens} D_s={head_dim_s} D_t={head_dim_t} {args.dtype}: {times}")


def best_tile(operands: Operands) -> tuple[float, triton_backend.Tile]:
    """Milliseconds and tile of the fastest candidate that is right."""
    times = []
    for tile in tiles.candidates(triton_backend.problem(operands)):
        try:
            if not is_right(operands, tile):
                print(f"wrong: {tile}", file=sys.stderr)
                continue
            step_ms = triton.testing.do_bench(
                lambda tile=tile: triton_backend.run(operands, tile), return_mode="median"
            )
        except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError) as error:
            print(f"does not fit: {tile}: {error}", file=sys.stderr)
            continue
        times.append((step_ms, tile))
    return min(times, key=lambda timed: timed[0])


def main() -> None:
    """Print the lines to check in."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--num-tokens", nargs="+", type=int, default=[50, 197, 577])
    parser.add_argument("--head-dims", nargs="+", default=["16x64", "32x64", "64x64"], help="student x teacher")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--num-heads", type=int, default=12)
    parser.add_argument("--crossover", action="store_true", help="N from 64 to 256, default tiles only")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune_tiles: got no GPU, want one: times on another machine tell nothing")
    head_dims = [tuple(map(int, widths.split("x"))) for widths in args.head_dims]
    if args.crossover:
        for head_dim_s, head_dim_t in head_dims:
            crossover(args, head_dim_s, head_dim_t)
        return
    for num_tokens in args.num_tokens:
        for head_dim_s, head_dim_t in head_dims:
            operands = problem_operands(args, num_tokens, head_dim_s, head_dim_t)
            step_ms, tile = best_tile(operands)
            print(f"    {triton_backend.problem(operands)}: {tile},  # {1e3 * step_ms:.0f} us")


if __name__ == "__main__":
    main()
