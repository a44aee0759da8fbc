"""LightlyTrain's local distillation loss is `relation_kl` of one head on whole features."""

import pytest
import torch
from torch import nn

from tinymim_fast.kernels import relation_kl, triton_backend

TEMPERATURE = 0.07


def as_lightly_train_writes_it(student, teacher):
    """DistillationV3Loss's `local_loss` of features (B, N, D) of length 1, in their dtype."""
    of_teacher, of_student = (torch.einsum("bmd,bnd->bmn", z, z).flatten(0, 1) for z in (teacher, student))
    log_s = nn.functional.log_softmax(of_student / TEMPERATURE, dim=-1)
    p_t = nn.functional.softmax(of_teacher / TEMPERATURE, dim=-1)
    return nn.KLDivLoss(reduction="batchmean", log_target=False)(log_s, p_t)


def as_ours(student, teacher, backend="auto"):
    x_s, x_t = (z[:, None] for z in (student, teacher))
    scales = {"scale_s": 1 / TEMPERATURE, "scale_t": 1 / TEMPERATURE}
    return relation_kl(x_s, x_s, x_t, x_t, **scales, backend=backend)


def loss_and_grad(loss, student, teacher, *args):
    """The gradient reaches the features before they are normalised."""
    student = student.detach().requires_grad_()
    value = loss(*(nn.functional.normalize(z, dim=-1) for z in (student, teacher)), *args)
    return value.detach(), *torch.autograd.grad(value, student)


@pytest.mark.parametrize(
    ("backend", "shape", "widths"),
    [
        ("chunked", (2, 196), (192, 768)),  # ViT-T from ViT-B
        ("chunked", (2, 196), (768, 768)),  # projected to the teacher's width, as LightlyTrain does
        ("reference", (2, 196), (192, 768)),
        pytest.param(
            *("triton", (1, 17), (192, 768)),
            marks=pytest.mark.skipif(not triton_backend.INTERPRETED, reason="needs TRITON_INTERPRET=1"),
        ),
    ],
)
def test_the_same_loss_and_gradient(assert_as_exact, backend, shape, widths):
    torch.manual_seed(0)
    # Regions of an image, other ones for the student: a loss of order one, as its terms are.
    student, teacher = (
        0.5 * torch.randn(*shape, width) + torch.randn(8, width)[torch.arange(shape[1]) * 8 // num_rows % 8]
        for width, num_rows in zip(widths, (shape[1], 64), strict=True)
    )
    ours = loss_and_grad(as_ours, student, teacher, backend)
    theirs = loss_and_grad(as_lightly_train_writes_it, student, teacher)
    exact = loss_and_grad(as_lightly_train_writes_it, student.double(), teacher.double())
    assert exact[0] > 0.1
    for name, *results in zip(("loss", "gradient"), ours, theirs, exact, strict=True):
        assert_as_exact(name, *results, torch.float32)
