"""benchmarks/teacher_precision.py: fp8 on a CPU, and what is printed."""

import logging

import pytest
import torch
from torch import nn

pytest.importorskip("deepspeed")

import teacher_precision
from support.programs import TEACHER
from tinymim_fast.kernels.reference import relation_kl


def test_fp8_keeps_what_it_has_numbers_for_and_rounds_the_rest_by_row():
    exact = torch.tensor([[448.0, 2.0, -1.5, 0.0], [7.0, -0.4375, 3.5, 1.75]])
    assert torch.equal(teacher_precision.rounded_to_fp8(exact), exact), "rows that are numbers of fp8, scaled"
    z = torch.randn(64, 300, dtype=torch.float64).float()
    error = (teacher_precision.rounded_to_fp8(z) - z).abs()
    assert (error <= z.abs() / 16 + z.abs().amax(-1, keepdim=True) * 2**-18 + 1e-9).all(), "3 bits behind the first"
    assert error.max() > 0.01
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.GELU())
    teacher_precision.emulate_fp8(model)
    assert isinstance(model[0][0], teacher_precision.EmulatedFp8)
    x = torch.randn(3, 8)
    rounded = teacher_precision.rounded_to_fp8(x)
    torch.testing.assert_close(model[0](x), nn.functional.linear(rounded, model[0][0].weight, model[0][0].bias))


def test_errors_are_those_of_the_formula():
    torch.manual_seed(0)
    exact = torch.randn(2, 9, 3 * 8)
    lower = exact + 0.01 * torch.randn_like(exact)
    found = teacher_precision.errors(exact.split(1), lower.split(1), 2)
    q, k, _ = (z.unflatten(-1, (2, -1)).transpose(1, 2).double() for z in exact.chunk(3, -1))
    q_l, k_l, _ = (z.unflatten(-1, (2, -1)).transpose(1, 2).double() for z in lower.chunk(3, -1))
    kl = relation_kl(q_l, k_l, q, k, scale_s=0.5, scale_t=0.5).mean().item()
    assert found["KL qk"] == pytest.approx(kl, rel=1e-3)
    assert found["q"] == pytest.approx(((q_l - q).norm() / q.norm()).item(), rel=1e-6)


def test_a_line_for_each_precision(world, image_folder, teacher_file, monkeypatch, capsys, caplog):
    monkeypatch.setattr(teacher_precision.engines, "start", lambda: world)
    monkeypatch.setattr(teacher_precision.engines, "stop", lambda: None)
    parse = teacher_precision.parse
    kwargs = str({**TEACHER}).replace("'", '"')
    more = ["--img-size=32", "--teacher-model=vit_tiny_patch16_224", f"--teacher-model-kwargs={kwargs}"]
    more += ["--train-batch-size=16", "--warmup-epochs=0"]
    monkeypatch.setattr(teacher_precision, "parse", lambda kind, flags, prog: parse(kind, [*flags, *more], prog))
    flags = [f"--teacher-checkpoint={teacher_file}", f"--data-path={image_folder}", "--steps=2"]
    with caplog.at_level(logging.ERROR, "tinymim_fast"):  # and as it was afterwards
        assert teacher_precision.main([*flags, "--precisions", "fp32", "int8", "fp8"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert "torch" in first and [line.partition(" ")[0].rstrip(":") for line in lines] == ["fp32", "int8", "fp8"]
    assert "q 0.00e+00" in lines[0] and all("loss after 2 steps" in line for line in lines)
    assert all("0.00e+00" not in line for line in lines[1:])
