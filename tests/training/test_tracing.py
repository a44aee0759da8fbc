"""`--profile`: what is in the trace, and when none is written."""

import gzip
import json
import logging

import pytest

pytest.importorskip("deepspeed")

from support.programs import distill_flags
from support.runs import distil, pretrain_flags, pretrain_mae

RANGES = {"data", "teacher", "student", "loss", "backward", "optimizer"}


def test_a_trace_holds_so_many_steps_with_named_ranges(world, image_folder, teacher_file, tmp_path):
    changes = {"profile": 2, "gradient_accumulation_steps": 2}
    distil(world, *distill_flags(image_folder, teacher_file, tmp_path / "run", **changes))
    with gzip.open(tmp_path / "run" / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    named = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    for name in RANGES:
        assert named.count(name) == 4, f"{name}: {named.count(name)} times in 2 steps of 2 micro-batches"
    assert any(event["name"] == "aten::addmm" or event["name"] == "aten::linear" for event in events)


def test_pretraining_is_traced_too_and_runs_without_the_flag_are_not(world, image_folder, tmp_path):
    pretrain_mae(world, *pretrain_flags(image_folder, tmp_path / "run", profile=1))
    assert (tmp_path / "run" / "trace.json.gz").exists()
    pretrain_mae(world, *pretrain_flags(image_folder, tmp_path / "other", epochs=1))
    assert not (tmp_path / "other" / "trace.json.gz").exists()


def test_a_run_that_ends_before_its_trace_says_so(world, image_folder, teacher_file, tmp_path, caplog):
    caplog.set_level(logging.INFO, "tinymim_fast")
    distil(
        world,
        *distill_flags(
            image_folder, teacher_file, tmp_path / "run", profile=3, epochs=1, train_batch_size=32, warmup_epochs=0
        ),
    )
    assert not (tmp_path / "run" / "trace.json.gz").exists()
    assert "the run ended within its 5 steps of warm-up, nothing was traced" in caplog.text
