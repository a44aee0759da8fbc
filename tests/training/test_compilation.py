"""Compiled blocks in whole runs: same losses, exact resume, what is said of it, compilers that are missing."""

import json
import logging
import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._dynamo
import torch._inductor.config
from timm.layers import Mlp
from torch._inductor.utils import fresh_cache

pytest.importorskip("deepspeed")

from support.programs import distill_flags, start_ranks
from support.rank_worker import train_and_record
from support.runs import distil, last_step, losses
from tinymim_fast.batches import BatchPlan
from tinymim_fast.errors import EXIT_TERMINATED
from tinymim_fast.training.compilation import Compiler, wanted
from tinymim_fast.training.progress import Progress


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "stage", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow), 3]
)
def test_compiled_runs_learn_what_eager_ones_do_at_every_stage(
    world, image_folder, teacher_file, tmp_path, stage, caplog
):
    """With drop path, whose draws are eager's. One graph for the teacher's blocks, one for the student's."""
    caplog.set_level(logging.INFO, "tinymim_fast")
    small = tmp_path / "ds.json"
    small.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}))
    base = {"zero_stage": stage, "bf16": "false", "teacher_precision": "fp32", "drop_path": 0.3, "epochs": 2}
    base["deepspeed_config"] = small
    distil(world, *distill_flags(image_folder, teacher_file, tmp_path / "eager", **base))
    distil(world, *distill_flags(image_folder, teacher_file, tmp_path / "compiled", **base, compile="true"))
    np.testing.assert_allclose(losses(tmp_path / "compiled"), losses(tmp_path / "eager"), rtol=1e-4)
    said = [r.getMessage() for r in caplog.records if "compile:" in r.getMessage()]
    assert len(said) == 1 and said[0].startswith("compile: 2 graphs in"), said


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_compiled_run_resumes_exactly(world, image_folder, teacher_file, tmp_path, stage):
    base = {
        "zero_stage": stage,
        "bf16": "false",
        "teacher_precision": "fp32",
        "drop_path": 0.3,
        "epochs": 2,
        "compile": "true",
    }
    distil(world, *distill_flags(image_folder, teacher_file, tmp_path / "whole", **base))
    flags = distill_flags(image_folder, teacher_file, tmp_path / "cut", **base)
    train_and_record(world, None, 7, flags)
    distil(world, *flags)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_two_compiled_ranks_save_at_sigterm_and_go_on(world, image_folder, teacher_file, tmp_path):
    """Against an eager run of one rank, without a signal."""
    base = {"bf16": "false", "teacher_precision": "fp32", "drop_path": 0, "epochs": 20, "checkpoint_minutes": 0}
    distil(world, *distill_flags(image_folder, teacher_file, tmp_path / "whole", **base))
    flags = distill_flags(image_folder, teacher_file, tmp_path / "cut", **base, compile="true")
    # no pool of compiling processes beside two ranks
    runs = start_ranks("train", *flags, TORCHINDUCTOR_COMPILE_THREADS="1")
    try:
        runs[0].wait_for("step 2/", 400)
        for run in runs:
            os.kill(run.pid, signal.SIGTERM)
        outputs = [run.communicate(120)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [EXIT_TERMINATED] * 2, outputs
    assert "compile: 2 graphs in" in outputs[0] and "compiled again" not in outputs[0], outputs[0]
    assert 2 <= last_step(tmp_path / "cut") < 120, "stopped before the end, or the test shows nothing"
    distil(world, *flags)
    np.testing.assert_allclose(losses(tmp_path / "cut"), losses(tmp_path / "whole"), rtol=1e-3)


@pytest.mark.parametrize("lacks", ["compiler", "graph"])
def test_without_a_compiler_one_line_and_eager(world, image_folder, teacher_file, tmp_path, lacks, caplog, monkeypatch):
    """No C++ compiler; or blocks that can't be traced."""
    if lacks == "graph":
        monkeypatch.setattr("timm.models.vision_transformer.Mlp.forward", torch.compiler.disable(Mlp.forward))
    base = {"bf16": "false", "epochs": 1}
    distil(world, *distill_flags(image_folder, teacher_file, tmp_path / "eager", **base))
    broken = {"cpp.cxx": ("no-such-compiler",)} if lacks == "compiler" else {}
    with torch._inductor.config.patch(broken), fresh_cache():
        distil(world, *distill_flags(image_folder, teacher_file, tmp_path / "run", **base, compile="true"))
    assert losses(tmp_path / "run") == losses(tmp_path / "eager")
    said = [r.getMessage() for r in caplog.records if "going on with eager modules" in r.getMessage()]
    assert len(said) == 1 and said[0].startswith("compile: ") and "\n" not in said[0], said


def test_what_is_compiled_again_is_counted_with_the_reason(caplog, monkeypatch):
    compile_ = torch.compile  # without a C++ compiler: it takes seconds
    monkeypatch.setattr(torch, "compile", lambda f, options, **kwargs: compile_(f, backend="aot_eager", **kwargs))
    module = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with Compiler() as compiler:
        compiler.compile([module])
        module(torch.ones(2, 4)).sum().backward()
        assert compiler.after_step() > 0 and compiler.num_graphs == 1
        module(torch.ones(2, 4)).sum().backward()
        assert compiler.after_step() == 0 and "compiled again" not in caplog.text
        module(torch.ones(3, 4)).sum().backward()
        assert compiler.after_step() > 0 and compiler.num_graphs == 2
    (record,) = (r for r in caplog.records if r.name == "tinymim_fast")
    assert "compile: 1 graphs compiled again" in record.getMessage() and "size" in record.getMessage()


def test_names_of_weights_stay_and_auto_compiles_on_gpus_only():
    module = torch.nn.Sequential(torch.nn.Linear(4, 4))
    names = list(module.state_dict())
    Compiler().compile([module[0]])
    assert list(module.state_dict()) == names
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert [wanted(choice, device) for choice in ("auto", True, False) for device in (cpu, gpu)] == [
        *(False, True, True, True, False, False)
    ]


def test_time_spent_compiling_is_no_training(world, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    progress = Progress(
        world, ("loss",), BatchPlan(micro_batch_size=8), steps_per_epoch=1, bad_files=SimpleNamespace(reasons={}),
        start_step=0,
    )  # fmt: skip
    progress.bad_files.update = lambda reasons: None
    progress.add(torch.zeros(1), 0.1)
    now[0] += 0.5
    progress.leave_out(0.45)
    assert progress.record()["images_per_s"] == pytest.approx(8 / 0.05)
