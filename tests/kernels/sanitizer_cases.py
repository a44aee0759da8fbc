"""Every kernel once on small tensors, against the formula in fp64: for a memory or race checker to watch.

compute-sanitizer --tool memcheck python tests/kernels/sanitizer_cases.py
compute-sanitizer --tool racecheck python tests/kernels/sanitizer_cases.py

With --device cpu and TRITON_INTERPRET=1, the same in Triton's interpreter.
"""

import argparse
import sys

import torch

from tinymim_fast.kernels import relation_kl, relation_loss
from tinymim_fast.kernels.reference import FLOORS

# How many floors a gradient may err: no eager PyTorch is at hand to compare with.
NUM_FLOORS = {torch.float32: 20, torch.float16: 4, torch.bfloat16: 4}
# (N, D_s, D_t): one block of queries, several and the last ragged, more tokens than a single pass takes.
SHAPES = [(17, 12, 24), (197, 16, 64), (197, 64, 64), (300, 32, 64)]


def packed(num_tokens: int, head_dim: int, seed: int) -> torch.Tensor:
    """(1, N, 3 * 2 heads * D); the second head's logits need their maximum."""
    qkv = torch.randn(1, num_tokens, 3, 2, head_dim, generator=torch.Generator().manual_seed(seed))
    qkv[:, :, :, 1] *= 6
    return qkv.flatten(2)


def packed_loss(qkv_s: torch.Tensor, qkv_t: torch.Tensor, backend: str) -> torch.Tensor:
    return relation_loss(qkv_s, qkv_t, relation_heads=2, backend=backend)["loss"]


def packed_lengths(qkv_s: torch.Tensor, qkv_t: torch.Tensor, backend: str) -> torch.Tensor:
    lengths = torch.tensor([qkv_s.shape[1] - 3], device=qkv_s.device)
    return relation_loss(qkv_s, qkv_t, relation_heads=2, lengths=lengths, backend=backend)["loss"]


def rows(qkv_s: torch.Tensor, qkv_t: torch.Tensor, backend: str) -> torch.Tensor:
    """Forward only, then a backward pass that computes the maps again."""
    q_s, k_s, _ = qkv_s.unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    q_t, k_t, _ = qkv_t.unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    of_rows = relation_kl(q_s, k_s, q_t, k_t, reduction="none", backend=backend)
    return (of_rows * torch.linspace(0.5, 1.5, of_rows.shape[2], device=of_rows.device)).sum()


def loss_and_grad(function, qkv_s: torch.Tensor, qkv_t: torch.Tensor, backend: str) -> tuple[torch.Tensor, ...]:
    qkv_s = qkv_s.detach().requires_grad_()
    loss = function(qkv_s, qkv_t, backend)
    loss.backward()
    return loss.detach(), qkv_s.grad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("sanitizer_cases: got no GPU, want one, or --device cpu with TRITON_INTERPRET=1")
    # The interpreter's bf16 products are wrong.
    dtypes = [dtype for dtype in NUM_FLOORS if device == "cuda" or dtype != torch.bfloat16]
    for num_tokens, head_dim_s, head_dim_t in SHAPES:
        for dtype in dtypes:
            head_dims = head_dim_s, head_dim_t
            qkv_s, qkv_t = (packed(num_tokens, d, seed).to(device, dtype) for seed, d in enumerate(head_dims))
            for function in (packed_loss, packed_lengths, rows):
                ours = loss_and_grad(function, qkv_s, qkv_t, "triton")
                exact = loss_and_grad(function, qkv_s.double(), qkv_t.double(), "reference")
                errors = [((a.double() - e).abs().max() / e.abs().max()).item() for a, e in zip(ours, exact)]
                name = f"{function.__name__} N={num_tokens} D_s={head_dim_s} D_t={head_dim_t} {dtype}"
                if not (errors[0] <= 1e-5 and errors[1] <= NUM_FLOORS[dtype] * FLOORS[dtype]):
                    sys.exit(f"{name}: loss and gradient errors are {errors}")
                print(f"{name}: right", flush=True)


if __name__ == "__main__":
    main()
