"""Two runs in one output folder."""

import socket

import pytest

pytest.importorskip("deepspeed")

from support.programs import distill_flags, run_forked, start_forked
from support.runs import SIX_STEPS, distil, last_step, losses
from tinymim_fast.errors import EXIT_INPUT, InputError
from tinymim_fast.tasks import distill
from tinymim_fast.training.metrics import read_metrics


@pytest.mark.fault(
    "a second run is started in the folder of one that trains",
    "code 2, one line that names process and host; the first trains on; it may start when the first was killed",
)
def test_a_second_run_is_refused_while_the_first_lives(image_folder, teacher_file, tmp_path):
    flags = distill_flags(image_folder, teacher_file, tmp_path / "run", epochs=3000, checkpoint_interval=5)
    first = start_forked("train", *flags)
    try:
        first.wait_for("step 6/")
        code, output = run_forked("train", *flags)
        (line,) = (line for line in output.splitlines() if line.startswith("train.py: "))
        assert code == EXIT_INPUT and "Traceback" not in output, output
        assert f"another run is training here (host {socket.gethostname()}, process {first.pid})" in line
        steps = [record["step"] for record in read_metrics(tmp_path / "run")]
        assert steps == list(range(1, len(steps) + 1))
        assert first.poll() is None
        first.kill()
        first.communicate(180)
        stopped_at = last_step(tmp_path / "run")
        second = start_forked("train", *flags)
        try:
            second.wait_for(f"step {stopped_at + 1}/")
        finally:
            second.kill()
    finally:
        first.kill()


@pytest.mark.fault(
    "two runs are started in one new folder at the same moment",
    "one trains; the other is refused, also where the first is done before it looks again",
)
def test_of_two_runs_that_find_a_new_folder_one_trains(world, image_folder, teacher_file, tmp_path):
    flags = distill_flags(image_folder, teacher_file, tmp_path / "run", **SIX_STEPS)

    def while_the_other_trains(*args):
        distil(world, *flags)
        return distill.build_task(*args)

    with pytest.raises(InputError, match="another run has trained here meanwhile; the same command continues it"):
        distil(world, *flags, build_task=while_the_other_trains)
    assert last_step(tmp_path / "run") == len(losses(tmp_path / "run")) == 6
    assert not list((tmp_path / "run" / "checkpoints").glob("aside_*"))
