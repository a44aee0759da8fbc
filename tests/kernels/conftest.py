"""The rule of every numerical test here, and inputs for it."""

import numpy as np
import pytest
import torch

from support import exact
from tinymim_fast.kernels import cpu, triton_backend


@pytest.fixture
def assert_as_exact():
    return exact.assert_as_exact


@pytest.fixture
def poisoned():
    """Uninitialised memory holds NaN, so that reading or returning it shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def products_as_a_matrix_unit_sums_them():
    """Sixteen at a time, added to fp32: x y^T and (y x^T)^T are bitwise equal.

    The interpreter's are BLAS's, where they may differ by 1e-7 of a logit. A gradient kernel that computes a map again,
    transposed, then finds other logits than those whose maximum it subtracts.
    """
    if not triton_backend.INTERPRETED:
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(builder, a, b, d, input_precision, max_num_imprecise_acc):
        total, left, right = d.data, a.data.astype(np.float64), b.data.astype(np.float64)
        for k in range(0, left.shape[-1], 16):
            total = (total + left[..., k : k + 16] @ right[..., k : k + 16, :]).astype(d.data.dtype)
        return TensorHandle(total, d.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", create_dot)
        yield


@pytest.fixture(scope="module", params=["compiled", "pytorch"])
def loops(request):
    """Backend "chunked" by the C++ library, then by PyTorch, whatever the machine has."""
    if request.param == "compiled":
        if not cpu.takes(torch.empty(0)):
            pytest.skip("no C++ compiler")
        yield request.param
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "takes", lambda *tensors: False)
        yield request.param
