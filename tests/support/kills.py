"""Kills, full disks and changes of scale, for the tests and for the longer trial of record (`python tests/soak.py`)."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from support.fork_server import Forked
from support.programs import PACKAGE, start_ranks, start_training
from tinymim_fast.distributed import free_port
from tinymim_fast.models.checkpoints import latest_checkpoint, list_checkpoints
from tinymim_fast.training.metrics import read_metrics

SPARE_PAGES = 8  # for folders, and temporary copies of small files
FILES = ("model.safetensors", "optimizer.safetensors")


@dataclass
class Tally:
    """What kills met and what they cost.

    Args:
        kills: SIGKILLs sent.
        in_writing: of them, those after which something unfinished lay in the folder of checkpoints.
        steps: the newest checkpoint's step after each kill.
    """

    kills: int = 0
    in_writing: int = 0
    steps: list[int] = field(default_factory=list)


def kill_in_writing(start: Callable[[], list[Forked]], output_dir: Path, rng: random.Random, tally: Tally) -> None:
    """Start the ranks, and SIGKILL all or one of them, up to 8 ms after they began to write a checkpoint.

    Afterwards every folder that is called a checkpoint must be one, and no step that was saved may be lost.
    """
    folder = output_dir / "checkpoints"
    before = latest_checkpoint(output_dir)
    began = time.time_ns()
    runs = start()
    try:
        while not unfinished(folder, since=began):
            if any(run.poll() is not None for run in runs):
                outputs = "\n".join(run.communicate()[0] for run in runs)
                raise AssertionError(f"ended before it could be killed, {[run.returncode for run in runs]}:\n{outputs}")
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.008))
        for run in rng.choice([runs, [rng.choice(runs)]]):
            run.kill()
            tally.kills += 1
        for run in runs:  # what lost a rank ends by itself
            run.communicate(120)
    finally:
        for run in runs:
            run.kill()
    tally.in_writing += unfinished(folder, since=began)
    after = latest_checkpoint(output_dir)
    assert_complete(output_dir)
    tally.steps.append(0 if after is None else int(after.name.removeprefix("step_")))
    assert before is None or (after is not None and before.name <= after.name), f"{before} was the newest, then {after}"


def assert_complete(output_dir: Path) -> None:
    """Every folder named as a checkpoint holds both files, whole and finite."""
    for checkpoint in list_checkpoints(output_dir):
        for name in FILES:
            tensors = load_file(checkpoint / name)
            assert tensors and all(tensor.isfinite().all() for tensor in tensors.values()), checkpoint / name


def assert_same_run(output_dir: Path, reference: Path) -> None:
    """The same losses at every step, once each, and the same last weights, bit for bit."""
    ours, theirs = read_metrics(output_dir), read_metrics(reference)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for part in ("loss", "qk", "vv", "lr"):
        assert [r[part] for r in ours] == [r[part] for r in theirs], part
    mine, other = (load_file(latest_checkpoint(folder) / FILES[0]) for folder in (output_dir, reference))
    assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


def change_scale(
    flags: Callable[..., list[str]],
    scales: Sequence[tuple[int, int, int]],
    *,
    every: int,
    output_dir: Path,
    reference: Path,
) -> float:
    """Kill a run after each `every` steps, and go on with the next of `scales`: (ranks, ZeRO stage, micro-batch).

    Returns:
        The largest relative difference of a step's loss from the reference's.
    """
    for number, (ranks, stage, micro) in enumerate(scales, start=1):
        scale = {"zero_stage": stage, "train_micro_batch_size_per_gpu": micro, "checkpoint_interval": every}
        runs = start_ranks("train", *flags(**scale), ranks=ranks)
        try:
            if number < len(scales):
                runs[0].wait_for(f"step {every * number + 1}/")
            else:
                outputs = [run.communicate()[0] for run in runs]
                assert [run.returncode for run in runs] == [0] * ranks, "\n".join(outputs)
        finally:
            for run in runs:
                run.kill()
                run.communicate()
    ours, theirs = read_metrics(output_dir), read_metrics(reference)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    return max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(ours, theirs, strict=True))


@contextlib.contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Path]:
    """A file system of its own with so little room, at `folder`.

    Raises:
        PermissionError: this process may not mount one.
    """
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        raise PermissionError(mounted.stderr.decode())
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def resize(disk: Path, kib: int) -> None:
    """Another size for a `small_disk`."""
    subprocess.run(["mount", "-o", f"remount,size={kib}k", str(disk)], check=True)


def kib_of(run: Path, num_checkpoints: float) -> int:
    """What a run's small files need, in whole pages, and so many of its checkpoints."""
    pages = sum(-(-path.stat().st_size // 4096) for path in run.iterdir() if path.is_file())
    one = sum(-(-path.stat().st_size // 4096) for path in list_checkpoints(run)[-1].iterdir())
    return 4 * (pages + round(num_checkpoints * one) + SPARE_PAGES)


def run_to_end(start: Callable[[], list[Forked]], timeout: float = 300) -> None:
    """Start the ranks and let them finish; an error with their output where one fails."""
    runs = start()
    try:
        outputs = [run.communicate(timeout)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0] * len(runs), "\n".join(outputs)


def unfinished(folder: Path, since: int) -> bool:
    """Whether something lies in `folder` under a temporary name that was written to after `since`, in ns."""
    try:
        paths = [path for path in folder.iterdir() if path.name.startswith("tmp_")]
        return any(path.stat().st_mtime_ns > since for path in paths)
    except FileNotFoundError:  # renamed or removed meanwhile, or no folder yet
        return False


def lose_a_host(flags: Sequence[str], *, output_dir: Path, reference: Path, log: Path) -> None:
    """Two torchruns meet at a port and train with two ranks; one is killed with its rank, and the other ends the run.

    Losses must be the reference's, of one rank, to 2 %.
    """
    port = free_port()
    elastic = [
        *["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=2", "--rdzv-backend=c10d", "--rdzv-id=run"],
        *[f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-conf=last_call_timeout=25"],
    ]
    command = (Path(sys.executable).parent / "torchrun", *elastic, PACKAGE / "train.py", *flags)
    with open(log, "w") as stdout:
        hosts = [start_training(*command, stdout=stdout)]
        try:
            _wait_until(lambda: _is_open(port), hosts[0], log)  # the first holds the rendezvous, and stays
            hosts.append(start_training(*command, stdout=stdout))
            _wait_until(lambda: latest_checkpoint(output_dir) is not None, hosts[0], log)
            assert _images_at_once(output_dir) == 8, f"the second came too late to share the 16\n{log.read_text()}"
            lost = hosts[1]
            for rank in subprocess.run(["pgrep", "-P", str(lost.pid)], capture_output=True, text=True).stdout.split():
                os.killpg(int(rank), signal.SIGKILL)
            lost.kill()
            assert hosts[0].wait(240) == 0, log.read_text()
        finally:
            for host in hosts:
                host.terminate()
    assert "continuing from" in log.read_text() and _images_at_once(output_dir) == 16, log.read_text()
    ours, theirs = read_metrics(output_dir), read_metrics(reference)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    assert max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(ours, theirs, strict=True)) < 0.02


def _images_at_once(output_dir: Path) -> int:
    """Of each rank, as the run was last started."""
    return json.loads((output_dir / "deepspeed_config.json").read_text())["train_micro_batch_size_per_gpu"]


def _is_open(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _wait_until(condition: Callable[[], bool], process: subprocess.Popen, log: Path, timeout: float = 240) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
