"""Images/s of teachers and students in inference: what a small model is worth where it is deployed.

python benchmarks/throughput.py --output benchmarks/results/throughput_cpu.csv

Models of the recipes' sizes with 1,000 classes at 224 pixels, random weights, in PyTorch (fp32, bf16) and, on a CPU
where onnxruntime is installed, as the ONNX that `tinymim_fast.export --formats onnx` writes. Models are timed in
alternation; each is first held against itself in fp64.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import harness
import sweep
from tinymim_fast.models import deployment
from tinymim_fast.models.vit import create_vit

MODELS = {"L": "vit_large_patch16_224", "B": "vit_base_patch16_224", "S": "vit_small_patch16_224",
          "T": "vit_tiny_patch16_224"}  # fmt: skip
IMG_SIZE, NUM_CLASSES = 224, 1000
COLUMNS = ("error", "eager_error", "peak_extra_mib", *sweep.TIMES, "images_per_s", "million_parameters")
GATED = 2  # images


@dataclass(frozen=True, kw_only=True)
class Point(sweep.Point):
    """How all models are run.

    Args:
        runtime: "pytorch" or "onnxruntime".
        precision: "fp32" or "bf16".
        batch_size: images at once.
    """

    benchmark: str = "throughput"
    runtime: str
    precision: str
    batch_size: int


def build(name: str) -> torch.nn.Module:
    """A classifier of the recipes' size, fp32 on the CPU, the same weights each time."""
    torch.manual_seed(0)
    return create_vit(MODELS[name], img_size=IMG_SIZE, num_classes=NUM_CLASSES).eval()


def runner(name: str, point: Point, device: torch.device, scratch: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """What gives logits of images on `device` as the point says."""
    vit = build(name)
    if point.runtime == "onnxruntime":
        file = scratch / f"{name}.onnx"
        if not file.exists():
            deployment.save_onnx(deployment.export_program(vit, IMG_SIZE), file, {})
        return deployment.onnx_runner(file, num_threads=torch.get_num_threads())
    dtype = torch.bfloat16 if point.precision == "bf16" else torch.float32
    vit = vit.to(device, dtype)

    @torch.inference_mode()
    def run(images: torch.Tensor) -> torch.Tensor:
        return vit(images.to(dtype))

    return run


def measure(point: Point, args: argparse.Namespace, scratch: Path) -> dict[str, dict[str, Any]]:
    """Columns by model."""
    device = args.device
    runners = {name: runner(name, point, device, scratch) for name in args.providers}
    batch = torch.randn(point.batch_size, 3, IMG_SIZE, IMG_SIZE, device=device)

    def gate(name: str) -> dict[str, Any]:
        images = torch.randn(GATED, 3, IMG_SIZE, IMG_SIZE, generator=torch.Generator().manual_seed(1))
        vit, dtype = build(name), torch.bfloat16 if point.precision == "bf16" else torch.float32
        with torch.inference_mode():
            exact = vit.double()(images.double())
            eager = vit.to(dtype)(images.to(dtype))
        errors = [harness.relative_error(z.cpu(), exact) for z in (runners[name](images.to(device)), eager)]
        passed = harness.passes_gate(*errors, dtype)
        return {
            "status": harness.OK if passed else harness.FAILED_GATE,
            "error": f"{errors[0]:.3g}",
            "eager_error": f"{errors[1]:.3g}",
            "million_parameters": round(sum(p.numel() for p in vit.parameters()) / 1e6, 1),
        }

    steps = {name: lambda run=run: run(batch) for name, run in runners.items()}
    timing = {"device": device, "seconds": args.seconds, "num_repeats": args.num_repeats}
    found = harness.measure(steps, gate, **timing)
    for columns in found.values():
        if columns.get("step_ms"):
            columns["images_per_s"] = round(1e3 * point.batch_size / columns["step_ms"], 1)
    return found


def plan(args: argparse.Namespace) -> list[Point]:
    """The most important first."""
    ways = [("pytorch", "fp32"), ("pytorch", "bf16")]
    if args.device.type == "cpu" and importlib.util.find_spec("onnxruntime"):
        ways.insert(1, ("onnxruntime", "fp32"))
    return [
        Point(sweep="runtimes", runtime=runtime, precision=precision, batch_size=size)
        for size in args.batch_sizes
        for runtime, precision in ways
    ]


def show(rows: Sequence[sweep.Row]) -> None:
    """One point."""
    first = rows[0]
    print(f"\n{first['runtime']}, {first['precision']}, batch {first['batch_size']}")
    sweep.print_columns(
        rows,
        [("images/s", "images_per_s", "{:,.1f}".format), ("ms", "step_ms", "{:,.1f}".format), ("error", "error", str)],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write the rows; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sweep.add_flags(parser, MODELS)
    parser.add_argument("--batch-sizes", nargs="+", type=sweep.positive, default=[16, 1])
    parser.add_argument("--seconds", type=float, default=20.0, help="of all repeats of a point together")
    args = parser.parse_args(arguments)
    sweep.read_device(parser, args)
    args.providers = args.providers or list(MODELS)
    results = sweep.Results(args.output, args.device)
    with tempfile.TemporaryDirectory(prefix="throughput_") as scratch:
        try:
            sweep.run(
                plan(args),
                lambda point: measure(point, args, Path(scratch)),
                results,
                columns=COLUMNS,
                show=show,
                budget_s=args.time_budget,
            )
        except KeyboardInterrupt:
            return sweep.finish(results, interrupted=True)
    return sweep.finish(results)


if __name__ == "__main__":
    sys.exit(main())
