"""Small images, a small teacher, and one process group for the tests that stay in this process."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# Before torch: spinning threads starve the other processes of a test, and so do two threads of each of two processes of
# tests.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that starts tests in the background has them ignore Ctrl-C, nohup SIGHUP, and what they start would too.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import pytest

from support.inputs import draw_images, save_teacher

# Without a GPU, Triton kernels run in its interpreter; it reads the variable when it is imported.
if not Path("/dev/nvidia0").exists() and not Path("/dev/kfd").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """See `draw_images`."""
    return draw_images(tmp_path_factory.mktemp("images") / "drawn")


@pytest.fixture(scope="session")
def world():
    """A process group of one, with one thread: sums come in the same order as in `start_training`'s processes."""
    import torch

    from tinymim_fast import engine

    torch.set_num_threads(1)

    kept = {k: os.environ.get(k) for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    yield engine.start()
    engine.stop()
    for key, value in kept.items():
        if value is None:
            os.environ.pop(key, None)


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory) -> Path:
    """See `save_teacher`."""
    return save_teacher(tmp_path_factory.mktemp("teacher") / "mae_pretrain.pth")
