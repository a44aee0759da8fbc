"""The backends: which there are, what "auto" means, and why one cannot take these tensors."""

from collections.abc import Sequence
from types import ModuleType

import torch

from tinymim_fast.kernels import chunked, triton_backend

# Each has relation_kl and packed_relation_kl, which give the row losses and write the student's gradient, and why_not.
# Beside them stands "reference", plain PyTorch with all derivatives, which needs no gradient written.
FUSED: dict[str, ModuleType] = {"chunked": chunked, "triton": triton_backend}
BACKENDS = ("auto", "reference", *FUSED)


def check(backend: str) -> None:
    """ValueError for a name that is not in the table."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, want one of {BACKENDS}")


def resolve(backend: str, device: torch.device, dtypes: Sequence[torch.dtype], head_dims: Sequence[int]) -> str:
    """The fused backend that `backend` stands for with tensors (B, H, N, D) like these.

    "auto" is "triton" on GPUs where it can take them, else "chunked": in Triton's interpreter, on the CPU, it never is.

    Args:
        backend: "auto" or a key of FUSED.
        device: of all tensors.
        dtypes, head_dims: dtype and D of the student and of the teacher.

    Raises:
        ValueError: the named backend cannot take them; says why.
    """
    if backend == "auto":
        fits = device.type == "cuda" and triton_backend.why_not(device, dtypes, head_dims) is None
        return "triton" if fits else "chunked"
    if (reason := FUSED[backend].why_not(device, dtypes, head_dims)) is not None:
        raise ValueError(f"backend: got {backend!r}, {reason}; want 'auto' or 'chunked'")
    return backend
