"""One distillation step with random images: how much of it is the loss, and how far it is from the hardware's limits.

python benchmarks/train_step.py                                  # the paper's pairs on a GPU, the smallest on a CPU
python benchmarks/train_step.py --pairs B-S --models compile --batch-size 512 --output train_step.csv

A step is the teacher up to its target block, the student under autocast over fp32 weights, the loss, the backward pass
and AdamW; no drop path, no data loading, no DeepSpeed. Losses are those of providers.py; models run eager, or with
each block compiled on its own. A provider whose loss or gradient of the patch embedding is further from the whole step
in fp64 than the tests allow gets no number. Providers run in alternation, on three batches in rotation.
"""

from __future__ import annotations

import os

# Before torch starts OpenMP, as in train.py: a short spin was fastest on two quiet cores (benchmarks/NOTES.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import argparse
import copy
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import harness
import roofs
import sweep
from labels import OURS
from providers import PROVIDERS, Provider
from step_roofs import PAIRS, RELATIONS, Pair
from tinymim_fast.models.taps import Place, Taps
from tinymim_fast.models.vit import create_vit, freeze, init_mae_style

MODELS = "compile", "eager"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the result file, before the environment; numbers only where `status` is "ok".

    loss_ms is the loss and its gradient alone, loss_share its part of the step. tflop_per_s counts what the step cannot
    avoid, matmul_share is that of this GPU's measured products (model-FLOP utilisation), floor_share floor_ms /
    step_ms. Errors are relative to the largest entry of the fp64 result: of the loss, and of the patch embedding's
    gradient.
    """

    benchmark: str = "train_step"
    pair: str
    models: str
    dtype: str
    batch_size: int
    img_size: int
    provider: str
    status: str = harness.OK
    detail: str = ""
    step_ms: float | None = None
    step_ms_p20: float | None = None
    step_ms_p80: float | None = None
    num_repeats: int | None = None
    steps_per_repeat: int | None = None
    images_per_s: float | None = None
    loss_ms: float | None = None
    loss_share: float | None = None
    peak_extra_mib: float | None = None
    tflop_per_s: float | None = None
    matmul_share: float | None = None
    floor_share: float | None = None
    floor_ms: float | None = None
    loss_error: float | None = None
    grad_error: float | None = None


@dataclass
class Trainer:
    """Teacher, student and optimizer of one pair; `step` is what is timed."""

    teacher: nn.Module
    student: nn.Module
    optimizer: torch.optim.Optimizer
    relation_heads: int
    dtype: torch.dtype

    def qkv(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            (qkv_t,) = self.teacher(images.to(self.dtype)).values()
        half = self.dtype in (torch.float16, torch.bfloat16)
        with torch.autocast(images.device.type, dtype=self.dtype if half else None, enabled=half):
            (qkv_s,) = self.student(images).values()
        return qkv_s, qkv_t

    def step(self, provider: Provider, batches: Iterable[Tensor]) -> None:
        qkv_s, qkv_t = self.qkv(next(batches))
        provider(qkv_s, qkv_t, self.relation_heads, RELATIONS).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def loss_and_grad(self, provider: Provider, images: Tensor) -> tuple[Tensor, Tensor]:
        loss = provider(*self.qkv(images), self.relation_heads, RELATIONS)
        return loss.detach(), torch.autograd.grad(loss, self.student.model.patch_embed.proj.weight)[0]


def build(pair: Pair, *, models: str, img_size: int, dtype: torch.dtype, device: torch.device) -> Trainer:
    torch.manual_seed(0)
    teacher, student = (
        Taps(init(create_vit(vit.name, img_size=img_size)), [Place("qkv", vit.block)])
        for vit in (pair.teacher, pair.student)
    )
    freeze(teacher, dtype, device)
    student.to(device)
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=device.type == "cuda"
    )
    if models == "compile":
        for block in itertools.chain(teacher.model.blocks[:-1], student.model.blocks[:-1]):
            block.compile(dynamic=False)  # all blocks of a model share one compilation
    return Trainer(teacher, student, optimizer, pair.relation_heads, dtype)


def init(model: nn.Module) -> nn.Module:
    init_mae_style(model, pos_embed="sincos")
    return model


def exact_loss_and_grad(trainer: Trainer, images: Tensor) -> tuple[Tensor, Tensor]:
    """The whole step in fp64, with the weights and images as the dtype has them."""
    double = [copy.deepcopy(model).double() for model in (trainer.teacher, trainer.student)]
    exact = Trainer(*double, trainer.optimizer, trainer.relation_heads, torch.float64)
    return exact.loss_and_grad(PROVIDERS["eager"], images.double())


def measure(
    pair_name: str,
    models: str,
    providers: Sequence[str],
    device: torch.device,
    *,
    dtype: torch.dtype,
    batch_size: int,
    img_size: int = 224,
    seconds: float = 10.0,
    num_repeats: int | None = None,
) -> list[Row]:
    """One row for each provider; what runs out of memory or fails the gate says so."""
    torch._dynamo.reset()
    pair = PAIRS[pair_name]
    common = {
        "pair": pair_name,
        "models": models,
        "dtype": str(dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "img_size": img_size,
    }
    columns: dict[str, dict] = {name: {} for name in providers}
    trainer = build(pair, models=models, img_size=img_size, dtype=dtype, device=device)
    batches = itertools.cycle(
        [torch.randn(batch_size, 3, img_size, img_size, device=device).to(dtype) for _ in range(3)]
    )
    check(trainer, next(batches), columns)

    steps: dict[str, Callable[[], object]] = {}
    for name, found in columns.items():
        if "status" in found:
            continue
        step = lambda name=name: trainer.step(PROVIDERS[name], batches)  # noqa: E731
        try:
            step()
            found["peak_extra_mib"] = harness.peak_extra_mib(step, device)
            steps[name] = step
        except Exception as error:
            found.update(harness.failure(error))
        trainer.optimizer.zero_grad(set_to_none=True)
    timing = {"device": device, "num_repeats": num_repeats}
    qkv_s, qkv_t = (qkv.detach() for qkv in trainer.qkv(next(batches)))
    losses = {name: lambda name=name: loss_alone(PROVIDERS[name], qkv_s, qkv_t, pair.relation_heads) for name in steps}
    times = harness.time_interleaved(steps, seconds=seconds, **timing)
    loss_times = harness.time_interleaved(losses, seconds=seconds / 4, **timing)

    flop = pair.flop(batch_size, trainer.student.num_tokens)
    rates = roofs.measured_rates(device, dtype) if device.type == "cuda" else None
    for name, found in columns.items():
        if name not in steps:
            continue
        found.update(times[name])
        step_ms = found["step_ms"]
        found["images_per_s"] = round(1e3 * batch_size / step_ms, 2)
        found["loss_ms"] = loss_times[name]["step_ms"]
        found["loss_share"] = round(found["loss_ms"] / step_ms, 4)
        found["tflop_per_s"] = round(flop / step_ms / 1e9, 3)
        if rates is not None:
            floor_ms = sum(pair.floors_ms(batch_size, rates, trainer.student.num_tokens).values())
            found["matmul_share"] = round(1e12 * found["tflop_per_s"] / rates.flop_per_s, 4)
            found["floor_ms"], found["floor_share"] = round(floor_ms, 4), round(floor_ms / step_ms, 4)
    return [Row(provider=name, **common, **found) for name, found in columns.items()]


def check(trainer: Trainer, images: Tensor, columns: dict[str, dict]) -> None:
    """The rule of the tests: errors of at most twice those of eager models with the eager loss, plus a floor.

    The whole batch is filled with one or two images, whose loss and gradient it then has: fp64 would not fit for a
    batch, and compiled models would be compiled for another one.
    """
    batch_size = len(images)
    few = images[: 2 - batch_size % 2]
    images = few.repeat(batch_size // len(few), 1, 1, 1)
    exact = exact_loss_and_grad(trainer, few)

    def errors(of: Trainer, name: str, images: Tensor) -> list[float]:
        pairs = zip(of.loss_and_grad(PROVIDERS[name], images), exact)
        return [float(f"{harness.relative_error(actual, wanted):.2e}") for actual, wanted in pairs]

    allowed = errors(copy.deepcopy(trainer), "eager", few)  # a copy is not compiled
    for name, found in columns.items():
        try:
            found["loss_error"], found["grad_error"] = errors(trainer, name, images)
        except Exception as error:
            found.update(harness.failure(error))
            continue
        pairs = (found["loss_error"], allowed[0]), (found["grad_error"], allowed[1])
        if not all(harness.passes_gate(error, plain_error, trainer.dtype) for error, plain_error in pairs):
            detail = f"eager: loss error {allowed[0]}, gradient error {allowed[1]}"
            found.update(status=harness.FAILED_GATE, detail=detail)


def loss_alone(provider: Provider, qkv_s: Tensor, qkv_t: Tensor, relation_heads: int) -> Tensor:
    qkv_s = qkv_s.detach().requires_grad_()
    return torch.autograd.grad(provider(qkv_s, qkv_t, relation_heads, RELATIONS), qkv_s)[0]


def print_row(row: dict) -> None:
    if row["status"] != harness.OK:
        numbers = f"{row['status']}: {row['detail']}"
    else:
        spread = f"({row['step_ms_p20']:.4g} to {row['step_ms_p80']:.4g})"
        numbers = f"{row['step_ms']:>9.4g} {spread:<19}{row['images_per_s']:>9.0f}{100 * row['loss_share']:>7.0f} %"
        numbers += f"{row['peak_extra_mib']:>11.0f}"
        if row["matmul_share"] is not None:
            numbers += f"{100 * row['matmul_share']:>9.0f} %{100 * row['floor_share']:>7.0f} %"
    print(f"{row['pair']:<6}{row['models']:<9}{row['provider']:<10}{numbers}", flush=True)


def parse_args() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--pairs", nargs="+", choices=list(PAIRS), help="all on a GPU, S-T on a CPU")
    add("--models", nargs="+", choices=MODELS, help="both on a GPU, eager on a CPU")
    providers = "official, compile, chunked and, on a GPU, triton if not given"
    add("--providers", nargs="+", choices=list(PROVIDERS), help=providers)
    add("--dtype", choices=["bfloat16", "float16", "float32"], help="bfloat16 on a GPU, float32 on a CPU")
    add("--batch-size", type=int, help="256 on a GPU, 4 on a CPU")
    add("--num-repeats", type=int, help="as many as fit --seconds-per-point if not given")
    add("--seconds-per-point", type=float, default=6.0)
    add("--time-budget", type=float, default=float("inf"), help="seconds; starts no point that will not fit")
    add("--output", type=Path)
    args = parser.parse_args()
    cuda = args.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device; want --device cpu")
    args.pairs = args.pairs or (list(PAIRS) if cuda else ["S-T"])
    args.models = args.models or (MODELS if cuda else ["eager"])
    args.providers = args.providers or ["official", "compile", "chunked", *(["triton"] if cuda else [])]
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    args.batch_size = args.batch_size or (256 if cuda else 4)
    return args


def main() -> None:
    args = parse_args()
    device = torch.device(args.device)
    file = sweep.Results(args.output, device)
    start, longest_s = time.monotonic(), 0.0
    print(
        f"{'pair':<6}{'models':<9}{'loss':<10}{'ms':>9} {'(20 to 80 %)':<19}{'images/s':>9}{'loss':>9}{'extra MiB':>11}",
        end="",
    )
    print(f"{'matmul':>11}{'floor':>9}" if device.type == "cuda" else "")
    for pair, models in itertools.product(args.pairs, args.models):
        began = time.monotonic()
        if began - start + longest_s > args.time_budget:
            print(f"{pair:<6}{models:<9}left out: {args.time_budget:.0f} s are not enough")
            continue
        rows = measure(
            pair,
            models,
            args.providers,
            device,
            dtype=getattr(torch, args.dtype),
            batch_size=args.batch_size,
            seconds=args.seconds_per_point,
            num_repeats=args.num_repeats,
        )
        file.add(map(asdict, rows))
        for row in rows:
            print_row(asdict(row))
        longest_s = max(longest_s, time.monotonic() - began)
    bad = (harness.FAILED_GATE, harness.NOT_AVAILABLE)
    sys.exit(any(row["provider"] in OURS and row["status"] in bad for row in file.rows))


if __name__ == "__main__":
    main()
