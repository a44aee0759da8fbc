"""The training-step benchmark, on images of 32 pixels: 5 tokens."""

import contextlib
from dataclasses import replace

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("deepspeed")

import harness
import roofs
import step_loops
import step_roofs
import sweep
import train_step
from tinymim_fast.config import RECIPES

PAIR = step_roofs.PAIRS["S-T"]
POINT = train_step.Point(pair="S-T", batch_size=4, img_size=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("teachers")


def measure(world, folder, point=POINT, providers=tuple(step_loops.PROVIDERS)):
    with contextlib.ExitStack() as opened:
        measured = train_step.measure(point, providers, world, folder, opened, num_repeats=2, seconds=0)
    return {row["provider"]: row for row in sweep.rows_of(point, measured, train_step.COLUMNS)}


@pytest.mark.parametrize(
    ("precision", "zero_stage", "providers"),
    [
        ("bf16", 1, ["official_loop", "plain", "ours"]),
        ("fp32", 2, ["ours"]),
    ],
)
def test_rows(world, folder, precision, zero_stage, providers):
    changes = {"precision": precision, "teacher_precision": precision, "zero_stage": zero_stage}
    rows = measure(world, folder, replace(POINT, **changes), providers)
    assert list(rows) == providers
    for row in rows.values():
        assert row["status"] == harness.OK, row
        parts = sum(row[name] for name in train_step.PARTS)
        assert row["data_ms"] < 1
        assert row["step_ms"] > row["loss_ms"] > 0 and parts > 0 and row["peak_extra_mib"] > 0
        assert row["images_per_s"] == pytest.approx(4e3 / row["step_ms"], rel=0.01)
        assert 0 < row["grad_error"] < (1e-5 if precision == "fp32" else 0.1)
        assert 0 < row["matmul_share"] < 1
        assert row["floor_ms"] is None  # roofs of memory are a GPU's


def test_teachers_have_the_precision_of_a_run_and_the_official_one_the_students(world, folder, monkeypatch):
    monkeypatch.setattr("tinymim_fast.models.precision.architecture", lambda device: "cpu_avx512_bf16")
    rows = measure(
        world, folder, replace(POINT, precision="fp32"), ["official_loop", "ours", "ours, teacher_precision int8"]
    )
    assert [row["status"] for row in rows.values()][:2] == [harness.OK] * 2, rows
    assert [row["teacher_dtype"] for row in rows.values()] == ["fp32", "bf16", "int8"]
    assert rows["official_loop"]["loss_error"] < 1e-5 < rows["ours"]["loss_error"] < 0.05


def test_settings_that_cant_run_here_say_why(world, folder):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, which can")
    names = ["ours, attention sdpa", "ours, attention cudnn", "ours, cuda_graphs true", "ours, teacher_precision fp8"]
    first, *others = measure(world, folder, providers=names).values()
    assert first["status"] == harness.OK and first["step_ms"] > 0
    for row, reason in zip(others, ("can't run on cpu", "needs a CUDA device", "needs a GPU"), strict=True):
        assert row["status"] == harness.NOT_AVAILABLE and reason in row["detail"], row


def test_two_students_of_one_teacher_pass(world, folder):
    """Both are timed, and the losses of each are those alone."""
    point = replace(POINT, sweep="students", pair=train_step.STUDENTS, precision="fp32")
    with contextlib.ExitStack() as opened:
        rows = train_step.measure_students(point, world, folder, opened, num_repeats=2, seconds=0)
    assert list(rows) == ["together", "apart"]
    for row in rows.values():
        assert row["status"] == harness.OK and row["loss_error"] == 0, row
        assert row["images_per_s"] == pytest.approx(4e3 / row["step_ms"], rel=0.01)


def test_images_from_the_loader_are_waited_for(world, folder, monkeypatch):
    data_loading = pytest.importorskip("data_loading")
    draw = data_loading.draw_photographs
    monkeypatch.setattr(data_loading, "draw_photographs", lambda images, count: draw(images, 8))
    row = measure(world, folder, replace(POINT, data="loaded"), ["ours"])["ours"]
    assert row["status"] == harness.OK and 0 < row["data_ms"] < row["step_ms"]


def test_nobody_passes(world, folder, monkeypatch):
    monkeypatch.setattr(train_step, "PROVIDERS", {"ours": lambda *_: 1 / 0})
    assert measure(world, folder, providers=["ours"])["ours"]["status"] == harness.NOT_AVAILABLE


def test_who_fails_gets_no_number(world, folder, monkeypatch):
    plain = step_loops.plain

    def hungry(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def wrong_loss(*args):
        loop = plain(*args)
        return replace(loop, forward=lambda *inputs: 1.01 * loop.forward(*inputs))

    def wrong_gradient(*args):
        loop = plain(*args)
        return replace(loop, gradient=lambda: 1.01 * loop.gradient())

    failing = {"wrong loss": wrong_loss, "wrong gradient": wrong_gradient, "error": lambda *_: 1 / 0, "hungry": hungry}
    monkeypatch.setattr(train_step, "PROVIDERS", {"plain": plain, **failing})
    rows = measure(world, folder, replace(POINT, precision="fp32", teacher_precision="fp32"), ["plain", *failing])
    wanted = ["ok", harness.FAILED_GATE, harness.FAILED_GATE, harness.NOT_AVAILABLE, harness.OUT_OF_MEMORY]
    assert [row["status"] for row in rows.values()] == wanted
    assert all(row["detail"] and row["step_ms"] is None for name, row in rows.items() if name != "plain")


def test_ours_is_the_loops_own_step(world, folder):
    """The weights after two steps are those of the engine that `training/loop.py` builds, driven by its TrainStep."""
    from tinymim_fast import engine as engines
    from tinymim_fast.deepspeed_config import deepspeed_config
    from tinymim_fast.tasks.distill import build_task
    from tinymim_fast.training.step import TrainStep

    config = step_loops.config_of("S-T", folder, batch_size=4, precision="bf16", zero_stage=1, img_size=32)
    loop = step_loops.ours(config, world, contextlib.ExitStack())
    torch.manual_seed(config.seed)
    task, batches = build_task(config, world, None), config.batch_plan(1)
    engine = engines.Engine(
        task.model,
        deepspeed_config(batches, zero_stage=config.zero_stage, bf16=config.bf16),
        world,
        lr_at=lambda step: step_loops.LR,
        weight_decay=config.weight_decay,
        opt_betas=config.opt_betas,
        seed=config.seed,
    )
    step = TrainStep(engine, task.prepare, parts=task.parts, accumulation_steps=1)
    views = [tuple(torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(3)).unbind())] * 2
    results = []
    for run in (loop.step, step):
        torch.manual_seed(4)  # drop path
        batch = iter(views)
        results.append([run(batch) for _ in views][-1])
    assert torch.equal(*results)


def test_flop_are_pytorchs(world, folder):
    """Of the paper's loop: its attention is products that the counter sees."""
    config = step_loops.config_of("S-T", folder, batch_size=2, precision="fp32", zero_stage=1, img_size=32)
    student = step_loops.as_the_paper(config, world, contextlib.ExitStack()).student
    counted = {}
    with FlopCounterMode(display=False) as counter:
        (qkv_s,) = student(torch.randn(2, 3, 32, 32)).values()
        counted["forward"] = counter.get_total_flops()
        qkv_s.sum().backward()
        counted["backward"] = counter.get_total_flops() - counted["forward"]
    n, vit = 5, PAIR.student
    assert counted == {"forward": 2 * vit.flop(n, backward=False), "backward": 2 * vit.flop(n, backward=True)}
    parameters = sum(p.numel() for p in student.parameters() if p.requires_grad and p.ndim > 1)
    assert vit.num_parameters() == parameters - vit.width  # the class token


def test_floors():
    rates = roofs.H200_UNDER_LOAD
    for pair in step_roofs.PAIRS.values():
        whole = sum(pair.floors_ms(256, rates).values())
        assert whole >= 1e3 * pair.flop(256) / rates.flop_per_s
        assert whole == pytest.approx(2 * sum(pair.floors_ms(128, rates).values()), rel=0.05)  # all but AdamW


@pytest.mark.parametrize("name", ["L-B", "B-S", "S-T"])
def test_pairs_are_the_recipes(name):
    config = yaml.safe_load((RECIPES / f"{step_loops.RECIPES[name]}.yaml").read_text())
    pair = step_roofs.PAIRS[name]
    assert (pair.teacher.name, pair.teacher.block) == (config["teacher_model"], config["target_block"])
    assert (pair.student.name, pair.relation_heads) == (config["student_model"], config["relation_heads"])
    assert list(step_roofs.RELATIONS) == config["relations"]


def test_the_plan_begins_with_what_matters_most():
    points = train_step.parse_args(["--device", "cpu", "--sweep", "pairs", "zero", "batch"]).points
    first = [(point.pair, point.precision) for point in points[:4]]
    assert first == [("S-T", "bf16"), ("B-T", "bf16"), ("S-T", "fp32"), ("B-T", "fp32")]
    assert [point.zero_stage for point in points if point.sweep == "zero"] == [0, 1, 2, 3]
    assert {point.batch_size for point in points if point.sweep == "batch"} == {16, 4}
