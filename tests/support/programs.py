"""What several test modules use: a tiny run's flags, and programs started as users start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import Mock

import pytest

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ImportError:  # on a GPU machine without it, the tests beside the property tests run

    def given(**strategies):
        return pytest.mark.skip(reason="hypothesis is not installed")

    def settings(**options):
        return lambda test: test

    st = Mock()

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "tinymim_fast"
# A student and a teacher that train in seconds: 32-pixel images, 16 patches.
TINY = {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
TEACHER = {"patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 3}
DEEPSPEED = Path(sys.executable).parent / "deepspeed"
# For what launchers and killed processes leave in the folder for temporary files; removed when the tests end.
SCRATCH = tempfile.TemporaryDirectory(prefix="tinymim_fast_tests_", ignore_cleanup_errors=True)


def distill_flags(image_folder: Path, teacher_file: Path, output_dir: Path, **changes: object) -> list[str]:
    """Flags of a run of a few steps, as a user would type them."""
    values = {
        "data_path": image_folder,
        "teacher_checkpoint": teacher_file,
        "output_dir": output_dir,
        "teacher_model": "vit_tiny_patch16_224",
        "teacher_model_kwargs": json.dumps(TEACHER),
        "student_model": "vit_tiny_patch16_224",
        "student_model_kwargs": json.dumps(TINY),
        "img_size": 32,
        "epochs": 3,
        "warmup_epochs": 1,
        "train_batch_size": 16,
        "lr": 1e-3,
        "log_interval": 1,
        "workers": 2,
        "tensorboard": "false",
        "loader": "torchvision",
        **changes,
    }
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None]


def start_training(*command: object, path: str | None = None, **options) -> subprocess.Popen:
    """A training program as its users start it; one thread a rank, for two cores."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": SCRATCH.name}
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(key, None)
    if path is not None:
        env["PATH"] = path
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **options,
    )


def run_training(*command: object, path: str | None = None, timeout: float = 240) -> tuple[int, str]:
    """Exit code and output of a training program."""
    process = start_training(*command, path=path)
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
    return process.returncode, output
