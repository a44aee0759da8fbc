"""Precision of a frozen teacher: what auto takes, what is refused, how far it is from fp32."""

import pytest
import timm
import torch
from torch import nn

from tinymim_fast.errors import InputError
from tinymim_fast.models import precision
from tinymim_fast.models.precision import choose_precision, has_bf16, lower_precision
from tinymim_fast.models.taps import Place, Taps

CPU = torch.device("cpu")


def tapped_teacher():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=3, img_size=32, patch_size=8, num_classes=0)
    return Taps(model, [Place("qkv", 3)])


@pytest.mark.parametrize("name, bf16", [("cpu", False), ("cpu_avx512_bf16", True), ("cpu_amx", True)])
def test_auto_is_bf16_where_the_cpu_has_instructions_for_it(monkeypatch, name, bf16):
    monkeypatch.setattr(precision, "architecture", lambda device: name)
    assert has_bf16(CPU) == bf16
    assert choose_precision("auto", CPU) == ("bf16" if bf16 else "fp32")


def test_what_the_device_cant_run_is_one_line_with_what_can():
    with pytest.raises(InputError, match="precision: got fp8, which needs a GPU; here auto, fp32, bf16 and int8 run"):
        choose_precision("fp8", CPU)


@pytest.mark.parametrize(
    ("capability", "installed", "choice", "why"),
    [
        ((8, 0), True, "fp8", "needs compute capability 8.9 or more"),
        ((9, 0), False, "fp8", r"needs torchao.*pip install 'tinymim_fast\[torchao\]'"),
        ((9, 0), False, "int8", "needs torchao"),
    ],
)
def test_gpus_without_fp8_and_a_missing_torchao(monkeypatch, capability, installed, choice, why):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(precision, "architecture", lambda device: "sm_{}{}".format(*capability))
    monkeypatch.setattr(precision.importlib.util, "find_spec", lambda name: object() if installed else None)
    with pytest.raises(InputError, match=why):
        choose_precision(choice, torch.device("cuda", 0))
    assert choose_precision("bf16", torch.device("cuda", 0)) == "bf16"


@pytest.mark.parametrize(("name", "largest_error"), [("fp32", 0.0), ("bf16", 0.02), ("int8", 0.05)])
def test_a_lowered_teacher_is_near_itself_and_builds_no_graph(name, largest_error):
    """Relative error (Frobenius) of the tapped projection: bf16 keeps 8 bits of a number, int8 7 of a row's largest."""
    images = torch.randn(4, 3, 32, 32)
    exact, lowered = tapped_teacher().eval(), tapped_teacher()
    dtype = lower_precision(lowered, name, CPU)
    assert dtype == (torch.bfloat16 if name == "bf16" else torch.float32) and not lowered.training
    (want,), (got,) = exact(images).values(), lowered(images.to(dtype)).values()
    assert not got.requires_grad and not any(p.requires_grad for p in lowered.parameters())
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert error <= largest_error, error
    if name == "int8":
        assert error > 1e-4, "nothing was quantised"
        assert not any(type(module) is nn.Linear for module in lowered.modules())
