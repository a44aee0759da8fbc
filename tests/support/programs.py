"""What several test modules use: a tiny run's flags, and programs started as users start them.

Three ways to have a run, the cheapest that shows the thing (seconds of a run of 18 steps, two cores):

- in this process, the fixture `world` and `support.runs.distil(world, *flags)`: 0.6 s. For what is trained and
  saved.
- `start_forked("train", *flags)` or `run_forked(...)`: 1.2 s. A process of its own in a session of its own, for
  signals, kills, hangs, exit codes and output: forked from a Python that has imported everything already (see
  fork_server.py). From `main(argv)` on it is what a user's run is; its parent, `run.launcher_pid`, stands where a
  launcher stands. `start_ranks` gives several ranks with the environment that launchers set. `run.wait_for("step 3/")`
  reads its output up to there.
- `start_training(sys.executable, PACKAGE / "train.py", *flags)` or `run_training(...)`: 6 s. As users type it. For
  launchers, import, and whatever happens before `main`.

Run processes end with the test that started them: `run_*` see to it, and for `start_*` a `finally: run.kill()`.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import Mock

import pytest

from support.fork_server import Forked, Server

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


def training_environment() -> dict[str, str]:
    """The environment of a training program: nothing of a launcher, one thread a rank, for two cores."""
    ours = {"OMP_NUM_THREADS": "1", "TMPDIR": SCRATCH.name, "PYTHONPATH": str(ROOT)}
    launchers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {key: value for key, value in os.environ.items() if key not in launchers} | ours


def start_training(*command: object, path: str | None = None, **options) -> subprocess.Popen:
    """A training program as its users start it."""
    env = training_environment()
    if path is not None:
        env["PATH"] = path
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options}
    command = [str(part) for part in command]
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, start_new_session=True, **options)


def run_training(*command: object, path: str | None = None, timeout: float = 240) -> tuple[int, str]:
    """Exit code and output of a training program."""
    process = start_training(*command, path=path)
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
    return process.returncode, output


@functools.cache
def _fork_server() -> Server:
    server = Server({**training_environment(), "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "3000"})
    atexit.register(server.close)
    return server


def start_forked(program: str, *flags: object, **environment: str) -> Forked:
    """`python -m tinymim_fast.PROGRAM FLAGS...` without its imports: see the head of this file.

    Args:
        program: "train", "pretrain", "finetune", "evaluate", "export" or "chain".
        flags: of the program.
        **environment: variables to add, e.g. RANK="0".
    """
    env = training_environment() | environment
    return _fork_server().start(f"tinymim_fast.{program}", [str(flag) for flag in flags], env, ROOT)


def start_ranks(program: str, *flags: object, ranks: int = 2, **environment: str) -> list[Forked]:
    """Several ranks of a run, each by `start_forked`, in the order of ranks."""
    from tinymim_fast.distributed import (
        free_port,
    )  # not above: conftest.py sets what torch and Triton read when imported

    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **environment}
    return [start_forked(program, *flags, RANK=str(rank), LOCAL_RANK=str(rank), **group) for rank in range(ranks)]


def run_forked(program: str, *flags: object, timeout: float = 120, **environment: str) -> tuple[int, str]:
    """Exit code and output of a program, by `start_forked`."""
    run = start_forked(program, *flags, **environment)
    try:
        output, _ = run.communicate(timeout)
    finally:
        run.kill()
    return run.returncode, output
