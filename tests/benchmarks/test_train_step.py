"""The training-step benchmark, on images of 32 pixels: 5 tokens."""

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

import harness
import roofs
import step_roofs
import train_step
from tinymim_fast.config import RECIPES

PAIR = step_roofs.PAIRS["S-T"]
CPU = torch.device("cpu")


def measure(models="eager", providers=("official", "chunked"), dtype=torch.float32):
    return train_step.measure(
        "S-T", models, providers, CPU, dtype=dtype, batch_size=4, img_size=32, num_repeats=2, seconds=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows(dtype):
    official, chunked = measure(dtype=dtype)
    assert (official.provider, chunked.provider) == ("official", "chunked")
    for row in (official, chunked):
        assert row.status == harness.OK and row.dtype == str(dtype).removeprefix("torch.")
        assert row.step_ms > row.loss_ms > 0 and 0 < row.loss_share < 1 and row.peak_extra_mib > 0
        assert row.images_per_s == pytest.approx(4e3 / row.step_ms, rel=0.01)
        assert 0 < row.grad_error < (1e-5 if dtype == torch.float32 else 0.1)
        assert row.floor_ms is row.matmul_share is None  # roofs are a GPU's


def test_who_fails_gets_no_number(monkeypatch):
    eager = train_step.PROVIDERS["eager"]

    def hungry(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    failing = {
        "wrong loss": lambda *args: 1.01 * eager(*args),
        "wrong gradient": lambda qkv_s, *args: eager(qkv_s, *args).detach() - 0 * qkv_s.sum(),
        "error": lambda *args: 1 / 0,
        "hungry": hungry,
    }
    monkeypatch.setattr(train_step, "PROVIDERS", {"eager": eager, **failing})
    eager_row, *rows = measure(providers=["eager", *failing])
    assert eager_row.status == harness.OK and eager_row.step_ms > 0
    wanted = [harness.FAILED_GATE, harness.FAILED_GATE, harness.NOT_AVAILABLE, harness.OUT_OF_MEMORY]
    assert [row.status for row in rows] == wanted
    assert all(row.detail and row.step_ms is None and row.images_per_s is None for row in rows)


def test_flop_are_pytorchs(monkeypatch):
    monkeypatch.setattr("timm.layers.config._USE_FUSED_ATTN", 0)  # products that the counter sees
    trainer = train_step.build(PAIR, models="eager", img_size=32, dtype=torch.float32, device=CPU)
    images = torch.randn(2, 3, 32, 32)
    counted = {}
    with FlopCounterMode(display=False) as counter:
        qkv_s, _ = trainer.qkv(images)
        counted["forward"] = counter.get_total_flops()
        qkv_s.sum().backward()
        counted["backward"] = counter.get_total_flops() - counted["forward"]
    n = 5
    teacher, student = (vit.flop(n, backward=False) for vit in (PAIR.teacher, PAIR.student))
    assert counted == {"forward": 2 * (teacher + student), "backward": 2 * PAIR.student.flop(n, backward=True)}
    parameters = sum(p.numel() for p in trainer.student.parameters() if p.requires_grad and p.ndim > 1)
    assert PAIR.student.num_parameters() == parameters - trainer.student.model.embed_dim  # the class token


def test_floors():
    rates = roofs.H200_UNDER_LOAD
    for pair in step_roofs.PAIRS.values():
        whole = sum(pair.floors_ms(256, rates).values())
        assert whole >= 1e3 * pair.flop(256) / rates.flop_per_s
        assert whole == pytest.approx(2 * sum(pair.floors_ms(128, rates).values()), rel=0.05)  # all but AdamW


@pytest.mark.parametrize(("name", "recipe"), [("L-B", "base"), ("B-S", "small"), ("S-T", "tiny")])
def test_pairs_are_the_recipes(name, recipe):
    config = yaml.safe_load((RECIPES / f"tinymim_{recipe}.yaml").read_text())
    pair = step_roofs.PAIRS[name]
    assert (pair.teacher.name, pair.teacher.block) == (config["teacher_model"], config["target_block"])
    assert (pair.student.name, pair.relation_heads) == (config["student_model"], config["relation_heads"])
    assert list(step_roofs.RELATIONS) == config["relations"]
