"""What asks a run to stop: signals to a process or to its whole group, at any moment, and the time limit."""

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")

from support import kills
from support.programs import DEEPSPEED, PACKAGE, distill_flags, start_forked, start_ranks, start_training
from support.runs import distil, last_step, losses
from tinymim_fast.distributed import free_port
from tinymim_fast.errors import EXIT_TERMINATED
from tinymim_fast.training.metrics import read_metrics

SLOW = pytest.mark.slow
LONG = {"epochs": 300, "checkpoint_minutes": 0}  # 1800 steps: half a minute


def group_is_gone(group: int, within_s: float = 10) -> bool:
    """Whether no process of the group is left; a zombie that nobody waits for is none."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not members(group):
            return True
        time.sleep(0.05)
    return False


def members(group: int) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        try:
            state, _, its_group = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if name.isdigit() and int(its_group) == group and state != "Z":
            found.append(int(name))
    return found


def command_of(pid):
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


def assert_saved(run, output, folder):
    """Code 75, one line that says where it stopped, a checkpoint of that step, every step recorded."""
    assert run.returncode == EXIT_TERMINATED, output
    assert "Traceback" not in output, output
    stopped_at = last_step(folder)
    assert 0 < stopped_at < 1800
    assert f"at step {stopped_at}, saved; the same command continues" in output, output
    assert [r["step"] for r in read_metrics(folder)] == list(range(1, stopped_at + 1))


@pytest.mark.fault(
    "SIGTERM, SIGINT, SIGUSR1 or SIGHUP to the whole process group, data workers included",
    "saves at the end of the step, one line, code 75; the same command goes on",
)
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_to_the_group_saves(image_folder, teacher_file, tmp_path, name):
    run = start_forked("train", *distill_flags(image_folder, teacher_file, tmp_path / "run", **LONG))
    try:
        run.wait_for("step 3/")
        os.killpg(run.pid, signal.Signals[name])
        output, _ = run.communicate(180)
        assert_saved(run, output, tmp_path / "run")
        assert f"stopped by {name}" in output
        assert group_is_gone(run.pid)
    finally:
        run.kill()


@pytest.mark.fault("signals again and again until the process is gone", "the same: none changes the exit code", tries=2)
@pytest.mark.parametrize("ranks", [1, 2])
def test_later_signals_change_nothing(image_folder, teacher_file, tmp_path, ranks):
    flags = distill_flags(image_folder, teacher_file, tmp_path / "run", **LONG)
    runs = [start_forked("train", *flags)] if ranks == 1 else start_ranks("train", *flags, ranks=ranks)
    try:
        runs[0].wait_for("step 3/")
        while any(run.poll() is None for run in runs):
            for run in runs:
                if run.poll() is None:
                    os.killpg(run.pid, signal.SIGTERM)
            time.sleep(0.02)
        for run in runs:
            output, _ = run.communicate(180)
            assert run.returncode == EXIT_TERMINATED and "Traceback" not in output, output
        assert last_step(tmp_path / "run") > 0
    finally:
        for run in runs:
            run.kill()


@pytest.mark.fault("SIGTERM to one rank of two", "both save the same step, code 75")
def test_a_signal_to_one_rank_stops_all(image_folder, teacher_file, tmp_path):
    runs = start_ranks("train", *distill_flags(image_folder, teacher_file, tmp_path / "run", **LONG))
    try:
        runs[0].wait_for("step 3/")
        os.kill(runs[1].pid, signal.SIGTERM)
        outputs = [run.communicate(180)[0] for run in runs]
        assert_saved(runs[0], outputs[0], tmp_path / "run")
        assert runs[1].returncode == EXIT_TERMINATED and "stopped by SIGTERM" in outputs[1], outputs[1]
    finally:
        for run in runs:
            run.kill()


@pytest.mark.fault("SIGTERM to the group while the run starts", "code 75 within seconds, nothing half-written is left")
@pytest.mark.parametrize("after_s", [0, 0.1, 0.3, 0.6])
def test_a_signal_at_start_up_leaves_nothing(image_folder, teacher_file, tmp_path, after_s):
    run = start_forked("train", *distill_flags(image_folder, teacher_file, tmp_path / "run", **LONG))
    try:
        wait_until_signals_are_taken(run)
        time.sleep(after_s)
        os.killpg(run.pid, signal.SIGTERM)
        output, _ = run.communicate(180)
        assert run.returncode == EXIT_TERMINATED and "Traceback" not in output, output
        assert "stopped by SIGTERM" in output
        assert not list((tmp_path).rglob("tmp_*"))
        assert group_is_gone(run.pid)
    finally:
        run.kill()


def wait_until_signals_are_taken(run):
    """Until the process has a handler of its own for SIGTERM: before it, a signal ends it as any program."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        caught = Path(f"/proc/{run.pid}/status").read_text().partition("SigCgt:")[2].split()[0]
        if int(caught, 16) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.005)
    pytest.fail("no handler for SIGTERM")


def stop_workers(run):
    """As a disk or a network share that doesn't answer would."""
    for worker in set(members(run.pid)) - {run.pid}:
        os.kill(worker, signal.SIGSTOP)


@pytest.mark.fault("SIGTERM while the data workers hang", "saves after 10 s, one line, code 75")
def test_a_run_that_waits_for_data_obeys(image_folder, teacher_file, tmp_path):
    run = start_forked("train", *distill_flags(image_folder, teacher_file, tmp_path / "run", **LONG))
    try:
        run.wait_for("step 3/")
        stop_workers(run)
        run.wait_for_silence()  # what was made ahead is used up
        os.killpg(run.pid, signal.SIGTERM)
        output, _ = run.communicate(180)
        assert_saved(run, output, tmp_path / "run")
        assert "stopped by SIGTERM while data was waited for (rank 0 for " in output
        assert group_is_gone(run.pid)
    finally:
        run.kill()


@pytest.mark.fault("`--max-time` is over", "saves, code 75; the same command goes on, bitwise as if undisturbed")
def test_max_time(world, image_folder, teacher_file, tmp_path):
    changes = {"epochs": 20, "log_interval": 8}
    flags = distill_flags(image_folder, teacher_file, tmp_path / "run", **changes)
    run = start_forked("train", *flags, "--max-time=0.01")
    try:
        output, _ = run.communicate(120)
    finally:
        run.kill()
    assert run.returncode == EXIT_TERMINATED, output
    assert f"stopped by max_time at step {last_step(tmp_path / 'run')}, saved" in output
    distil(world, *flags)
    distil(world, *distill_flags(image_folder, teacher_file, tmp_path / "whole", **changes))
    assert losses(tmp_path / "run")[-1] == losses(tmp_path / "whole")[-1]


def two_ranks(launcher):
    """The command line up to the program."""
    starts = {
        "deepspeed": [DEEPSPEED, "--num_accelerators=2", f"--master_port={free_port()}"],
        "torchrun": [DEEPSPEED.parent / "torchrun", "--standalone", "--nproc-per-node=2"],
    }
    return starts[launcher]


@pytest.mark.fault("SIGTERM to the group of `deepspeed` or `torchrun`", "all ranks save, whatever the launcher does")
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_signal_to_a_launchers_group_saves(image_folder, teacher_file, tmp_path, launcher):
    flags = distill_flags(image_folder, teacher_file, tmp_path / "run", **{**LONG, "checkpoint_interval": 5})
    process = start_training(*two_ranks(launcher), PACKAGE / "train.py", *flags)
    try:
        deadline = time.monotonic() + 120
        while last_step(tmp_path / "run") < 5 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=180)
        assert f"stopped by SIGTERM at step {last_step(tmp_path / 'run')}, saved" in output, output
        assert not list((tmp_path / "run" / "checkpoints").glob("tmp_*"))
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.fault("SIGKILL to `deepspeed` or `torchrun`", "all ranks notice, save and end")
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", pytest.param("launch.py", marks=SLOW)])
def test_orphans_save_and_end(image_folder, teacher_file, tmp_path, launcher):
    """launch.py is the process of `deepspeed` between it and the ranks."""
    flags = distill_flags(
        image_folder, teacher_file, tmp_path / "run", **{**LONG, "epochs": 3000, "checkpoint_interval": 5}
    )
    process = start_training(
        *two_ranks("deepspeed" if launcher == "launch.py" else launcher), PACKAGE / "train.py", *flags
    )
    try:
        deadline = time.monotonic() + 120
        while last_step(tmp_path / "run") < 5 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        victim = process.pid
        if launcher == "launch.py":
            (victim,) = [pid for pid in members(process.pid) if "deepspeed.launcher.launch" in command_of(pid)]
        os.kill(victim, signal.SIGKILL)
        output, _ = process.communicate(timeout=180)
        assert f"stopped by the end of its launcher at step {last_step(tmp_path / 'run')}, saved" in output, output
        assert group_is_gone(process.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.fault(
    "the data workers of one rank hang",
    "after `--max-wait` all ranks save and end with code 75, the rank is named; the same command goes on, bitwise",
    tries=4,
)
@pytest.mark.parametrize(
    ("ranks", "stage"), [(1, 1), (2, 2), pytest.param(2, 0, marks=SLOW), pytest.param(2, 3, marks=SLOW)]
)
def test_a_rank_without_data_loses_nothing(image_folder, teacher_file, tmp_path, ranks, stage):
    changes = {"epochs": 30, "zero_stage": stage, "drop_path": 0.2, "gradient_accumulation_steps": 2}

    def start(name, **more):
        flags = distill_flags(image_folder, teacher_file, tmp_path / name, **changes, **more)
        return start_ranks("train", *flags, ranks=ranks)

    runs = start("run", max_wait=0.05)
    try:
        runs[0].wait_for("step 3/")
        stop_workers(runs[-1])
        for run in runs:
            output, _ = run.communicate(180)
            assert run.returncode == EXIT_TERMINATED and "Traceback" not in output, output
            at = f"at step {last_step(tmp_path / 'run')}, saved; the same command continues"
            assert f"stopped by max_wait while data was waited for (rank {ranks - 1} for " in output and at in output
    finally:
        for run in runs:
            run.kill()
    assert 2 < last_step(tmp_path / "run") < 180
    for name in ("run", "whole"):
        kills.run_to_end(lambda name=name: start(name))
    kills.assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.fault(
    "SIGKILL to one rank of two",
    "the other ends with one line that names it and code 75; with ZeRO-0 rank 0 saves alone; the same command goes on",
)
@pytest.mark.parametrize(("victim", "stage"), [(1, 1), (1, 0), pytest.param(0, 2, marks=SLOW)])
def test_a_lost_rank_is_one_line(image_folder, teacher_file, tmp_path, victim, stage):
    changes = {**LONG, "zero_stage": stage, "checkpoint_interval": 0 if stage == 0 else 2}
    runs = start_ranks("train", *distill_flags(image_folder, teacher_file, tmp_path / "run", **changes))
    try:
        runs[0].wait_for("step 3/")
        runs[victim].kill()
        other = runs[1 - victim]
        output, _ = other.communicate(180)
        assert other.returncode == EXIT_TERMINATED and "Traceback" not in output and "frame #" not in output, output
        gone = f"another rank ended or can't be reached: rank {victim} (process {runs[victim].pid} is gone)"
        assert len([line for line in output.splitlines() if gone in line]) == 1, output
        assert f"the last checkpoint is step_{last_step(tmp_path / 'run'):08d}" in output
        assert ("ZeRO-" in output) == (stage > 0)
    finally:
        for run in runs:
            run.kill()
    if stage == 0:
        assert last_step(tmp_path / "run") == read_metrics(tmp_path / "run")[-1]["step"] >= 3
        kills.assert_complete(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.fault("SIGSTOP to one rank of two", "after `--max-wait` the other ends; one line names it, code 75")
def test_a_stopped_rank_is_named(image_folder, teacher_file, tmp_path):
    changes = {**LONG, "checkpoint_interval": 2, "max_wait": 0.05}
    runs = start_ranks("train", *distill_flags(image_folder, teacher_file, tmp_path / "run", **changes))
    try:
        runs[0].wait_for("step 3/")
        os.kill(runs[1].pid, signal.SIGSTOP)
        output, _ = runs[0].communicate(120)
        assert runs[0].returncode == EXIT_TERMINATED and "Traceback" not in output, output
        assert "s of waiting for rank 1 (no sign of life for " in output and "more than max_wait allows" in output
        assert f"the last checkpoint is step_{last_step(tmp_path / 'run'):08d}" in output
    finally:
        for run in runs:
            run.kill()
