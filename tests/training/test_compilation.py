"""Compiled blocks in whole runs: same losses, exact resume, what is said of it, compilers that are missing."""

import json
import logging

import numpy as np
import pytest
import torch

pytest.importorskip("deepspeed")

from support.programs import distill_flags
from support.runs import distil, losses


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
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
