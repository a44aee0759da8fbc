"""What a teacher of lower precision does to the targets and to what a student learns.

make demo && python benchmarks/teacher_precision.py --teacher-checkpoint demo-out/teacher --data-path demo-out/images

For each precision: the relative error (Frobenius) of q, k and v of the target block against the fp32 teacher's; the
mean KL divergence from the fp32 teacher's relations to its relations; and, after `--steps` steps of the same student
on the same images, its loss against the fp32 teacher on images that it was not trained on. On a CPU, which has no fp8
products, those are emulated: weights and inputs are rounded to float8_e4m3fn with one scale a row, and multiplied in
fp32.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import machine
import step_loops
from tinymim_fast import engine as engines
from tinymim_fast.config import parse
from tinymim_fast.data import build_loader, find_images
from tinymim_fast.distributed import World
from tinymim_fast.kernels import relation_loss
from tinymim_fast.models.precision import PRECISIONS, lower_precision
from tinymim_fast.models.taps import Place, Taps
from tinymim_fast.models.vit import default_target_block
from tinymim_fast.tasks.distill import DistillConfig, load_teacher
from tinymim_fast.training.task import train_view

LARGEST_FP8 = 448.0


class EmulatedFp8(nn.Module):
    """A linear layer whose weight and inputs are rounded to fp8, each row by its largest entry; products in fp32."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = rounded_to_fp8(linear.weight.float()), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., C_in) to (..., C_out), in the dtype of x."""
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(rounded_to_fp8(x.float()), self.weight, bias).to(x.dtype)


def rounded_to_fp8(z: Tensor) -> Tensor:
    """The nearest numbers that float8_e4m3fn has, after each row's largest entry was scaled to its largest number."""
    scale = LARGEST_FP8 / z.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    return (z * scale).to(torch.float8_e4m3fn).float() / scale


def emulate_fp8(model: nn.Module) -> None:
    """Each linear layer, in place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, EmulatedFp8(child))


def lowered(config: DistillConfig, precision: str, device: torch.device) -> tuple[nn.Module, torch.dtype, int]:
    """The teacher as a run has it, the dtype of its images, and the number of relation heads."""
    vit, _, _ = load_teacher(config)
    block = config.target_block or default_target_block(len(vit.blocks))
    teacher, heads = Taps(vit, [Place("qkv", block)]), config.relation_heads or vit.blocks[block - 1].attn.num_heads
    emulated = precision == "fp8" and device.type == "cpu"
    dtype = lower_precision(teacher, "bf16" if emulated else precision, device)
    if emulated:
        emulate_fp8(teacher)
    return teacher, dtype, heads


@torch.no_grad()
def tapped(teacher: nn.Module, dtype: torch.dtype, views: Sequence[Tensor]) -> list[Tensor]:
    """The packed projection of each batch, in fp32."""
    return [next(iter(teacher(view.to(dtype)).values())).float() for view in views]


def errors(exact: Sequence[Tensor], lower: Sequence[Tensor], heads: int) -> dict[str, float]:
    """Relative errors of q, k and v, and the mean KL divergence of each relation."""
    exact, lower = torch.cat(list(exact)), torch.cat(list(lower))
    found = {
        name: ((b - a).double().norm() / a.double().norm()).item()
        for name, a, b in zip("qkv", exact.chunk(3, -1), lower.chunk(3, -1))
    }
    kl = relation_loss(lower, exact, relation_heads=heads)
    return found | {f"KL {name}": kl[name].item() for name in ("qk", "vv")}


def train(
    config: DistillConfig, world: World, teacher: nn.Module, dtype: torch.dtype, batches: Sequence[step_loops.Views]
) -> step_loops.Loop:
    """The recipe's student after a step on each of the batches, taught by this teacher."""
    opened = ExitStack()
    with opened:
        loop = step_loops.ours(config, world, opened)

        def prepare(views: step_loops.Views) -> step_loops.Views:
            (qkv_t,) = teacher(views[0].to(dtype)).values()
            return views[1], qkv_t

        loop.step.prepare = prepare
        views = iter(batches)
        for _ in batches:
            loop.step(views)
    return replace(loop, prepare=prepare)


@torch.no_grad()
def loss_of(loop: step_loops.Loop, exact: Sequence[Tensor], views: Sequence[step_loops.Views]) -> float:
    """The student's mean loss against the exact teacher's projections."""
    loop.student.eval()
    losses = [loop.forward(student_view, qkv_t).item() for (_, student_view), qkv_t in zip(views, exact)]
    return sum(losses) / len(losses)


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--teacher-checkpoint", required=True, help="as for train.py")
    add("--data-path", required=True, help="as for train.py")
    add("--config", default="demo_student", help="of the student (default: demo_student)")
    add("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="default: all")
    add("--steps", type=int, default=200, help="0 trains none (default: 200)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each precision."""
    args = parse_args(arguments)
    logging.getLogger("tinymim_fast").setLevel(logging.ERROR)
    world = engines.start()
    flags = {"config": args.config, "teacher_checkpoint": args.teacher_checkpoint, "data_path": args.data_path}
    with tempfile.TemporaryDirectory() as scratch:
        flags |= {"output_dir": Path(scratch) / "none", "loader": "torchvision", "teacher_precision": "fp32"}
        config = parse(DistillConfig, [f"--{name}={value}" for name, value in flags.items()], "teacher_precision.py")
        index = find_images(Path(config.data_path), split="train", workers=config.workers)
        view = train_view(config, world, color_jitter=config.color_jitter)
        options = {"seed": 0, "device": world.device, "workers": config.workers, "loader": config.loader}
        with build_loader(index, view, config.batch_plan(1), **options) as loader:
            kept = list(itertools.islice(loader.batches(0, args.steps + 4), args.steps + 4))
    seen, held_out = kept[: args.steps], kept[args.steps :]
    of_teacher = [views[0] for views in held_out]
    teacher, dtype, heads = lowered(config, "fp32", world.device)
    exact = tapped(teacher, dtype, of_teacher)
    device = machine.cpu_name() if world.device.type == "cpu" else torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}")
    for precision in args.precisions:
        teacher, dtype, heads = lowered(config, precision, world.device)
        found = errors(exact, tapped(teacher, dtype, of_teacher), heads)
        cells = [f"{name} {value:.2e}" for name, value in found.items()]
        if args.steps:
            loop = train(config, world, teacher, dtype, seen)
            cells.append(f"loss after {args.steps} steps {loss_of(loop, exact, held_out):.5f}")
        emulated = " (emulated)" if precision == "fp8" and world.device.type == "cpu" else ""
        print(f"{precision}{emulated}: " + ", ".join(cells), flush=True)
    engines.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
