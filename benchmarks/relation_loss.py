"""Forward and backward of the relation losses, from packed qkv projections to the packed gradient.

python benchmarks/relation_loss.py --device cpu --output benchmarks/results/relation_loss_cpu.csv

A provider whose loss or gradient disagrees with the formula in fp64 gets no number.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import harness
from tinymim_fast.kernels import relation_loss

Provider = Callable[[Tensor, Tensor, int, list[str]], Tensor]


def official(qkv_s: Tensor, qkv_t: Tensor, num_heads: int, relations: list[str]) -> Tensor:
    """The formula as the paper's code computes it: softmax twice, then the logarithm of the student's."""
    kl = nn.KLDivLoss(reduction="none")
    loss = 0
    for x, y in relations:
        student = torch.softmax(logits(qkv_s, num_heads, x, y), dim=-1).log()
        teacher = torch.softmax(logits(qkv_t, num_heads, x, y), dim=-1)
        loss = loss + kl(student, teacher).sum(-1).mean()
    return loss


def eager(qkv_s: Tensor, qkv_t: Tensor, num_heads: int, relations: list[str]) -> Tensor:
    """The formula as PyTorch's documentation advises: log_softmax, the teacher's logarithm too."""
    loss = 0
    for x, y in relations:
        student = torch.log_softmax(logits(qkv_s, num_heads, x, y), dim=-1)
        teacher = torch.log_softmax(logits(qkv_t, num_heads, x, y), dim=-1)
        loss = loss + nn.functional.kl_div(student, teacher, log_target=True, reduction="none").sum(-1).mean()
    return loss


def ours(backend: str) -> Provider:
    return lambda qkv_s, qkv_t, num_heads, relations: relation_loss(
        qkv_s, qkv_t, relation_heads=num_heads, relations=relations, backend=backend
    )["loss"]


PROVIDERS: dict[str, Provider] = {
    "official": official,
    "eager": eager,
    "compile": torch.compile(official, dynamic=False),
    "reference": ours("reference"),
    "chunked": ours("chunked"),
    "triton": ours("triton"),
}


def logits(qkv: Tensor, num_heads: int, x: str, y: str) -> Tensor:
    """(B, H, N, N) scaled products of two of the projections in (B, N, 3 C)."""
    projections = qkv.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    x, y = projections["qkv".index(x)], projections["qkv".index(y)]
    return (x @ y.mT) * x.shape[-1] ** -0.5


def loss_and_grad(provider: Provider, qkv_s: Tensor, qkv_t: Tensor, *args) -> tuple[Tensor, Tensor]:
    qkv_s = qkv_s.detach().requires_grad_()
    loss = provider(qkv_s, qkv_t, *args)
    loss.backward()
    return loss.detach(), qkv_s.grad


def measure(args: argparse.Namespace, relations: list[str]) -> list[harness.Row]:
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    generator = torch.Generator(device).manual_seed(0)
    shape = (args.batch_size, args.num_tokens)
    qkv_s, qkv_t = (
        torch.randn(*shape, 3 * args.num_heads * width, device=device, generator=generator).to(dtype)
        for width in (args.head_dim_s, args.head_dim_t)
    )

    # The gate, on a few images: the fp64 maps of a whole batch would not fit beside a large one.
    small = qkv_s[:2], qkv_t[:2]
    exact = loss_and_grad(ours("reference"), *(qkv.double() for qkv in small), args.num_heads, relations)
    errors = {}
    for name in ["eager", *args.providers]:
        actual = loss_and_grad(PROVIDERS[name], *small, args.num_heads, relations)
        errors[name] = [harness.relative_error(a, e) for a, e in zip(actual, exact)]
    providers = []
    for name in args.providers:
        pairs = zip(errors[name], errors["eager"])
        if all(harness.passes_gate(error, eager_error, dtype) for error, eager_error in pairs):
            providers.append(name)
        else:
            print(f"{name}: not timed, loss and gradient errors are {errors[name]}", file=sys.stderr)

    inputs = qkv_s, qkv_t, args.num_heads, relations
    steps = {name: partial(loss_and_grad, PROVIDERS[name], *inputs) for name in providers}
    times = harness.time_interleaved(steps, args.num_repeats, device)
    return [
        harness.Row(
            benchmark="relation_loss",
            provider=name,
            relations="+".join(relations),
            dtype=args.dtype,
            batch_size=args.batch_size,
            num_heads=args.num_heads,
            num_tokens=args.num_tokens,
            head_dim_s=args.head_dim_s,
            head_dim_t=args.head_dim_t,
            **harness.percentiles(times[name]),
            num_repeats=args.num_repeats,
            loss_error=float(f"{errors[name][0]:.2e}"),
            grad_error=float(f"{errors[name][1]:.2e}"),
            **harness.environment(device),
        )
        for name in providers
    ]


def parse_args() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float64", "float32", "float16", "bfloat16"])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--num-heads", type=int, default=12)
    parser.add_argument("--num-tokens", type=int, default=197)
    parser.add_argument("--head-dim-s", type=int, default=16)
    parser.add_argument("--head-dim-t", type=int, default=64)
    parser.add_argument("--relations", nargs="+", default=["qk", "qk+vv"], help="each is timed on its own")
    parser.add_argument(
        "--providers", nargs="+", choices=list(PROVIDERS), help="all that run on the device if not given"
    )
    parser.add_argument("--num-repeats", type=int, default=15)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    args.providers = args.providers or [name for name in PROVIDERS if name != "triton" or args.device != "cpu"]
    return args


def main() -> None:
    args = parse_args()
    rows = [row for relations in args.relations for row in measure(args, relations.split("+"))]
    harness.print_table(rows, ours="chunked" if args.device == "cpu" else "triton")
    if args.output:
        harness.write_csv(args.output, rows)


if __name__ == "__main__":
    main()
