"""A run's small files, damaged, removed or in the way: none blocks a resume by a traceback, no metrics end a run."""

import os
import shutil
import signal

import pytest
import yaml

pytest.importorskip("deepspeed")

from support.programs import distill_flags, run_forked, start_forked
from support.runs import SIX_STEPS, distil, last_step, losses
from tinymim_fast.errors import EXIT_INPUT, EXIT_TERMINATED, InputError
from tinymim_fast.training.metrics import read_metrics

JUNK = {
    "empty": b"",
    "junk": b"\x00\xff\xfe: [",
    "list": b"- 1\n- 2\n",
    "cut": b"data_pa",
    "number": b"7",
    "folder": None,
    "pipe": "pipe",
}


@pytest.fixture
def cut_short(six_steps, tmp_path):
    """A run that has three of its six steps to go."""
    shutil.copytree(six_steps, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000006")
    return tmp_path / "run"


def put(path, content):
    path.unlink()
    if content == "pipe":  # which nobody writes into: opening it would wait for ever
        os.mkfifo(path)
    else:
        path.mkdir() if content is None else path.write_bytes(content)


@pytest.mark.fault(
    "config.yaml is empty, junk, cut off, another thing, a folder, a pipe or gone",
    "it is named and written anew from the newest checkpoint; the run goes on",
    tries=8,
)
@pytest.mark.parametrize("how", [*JUNK, "gone"])
def test_config_is_rebuilt(world, image_folder, teacher_file, cut_short, six_steps, caplog, how):
    path = cut_short / "config.yaml"
    before = path.read_text()
    put(path, JUNK.get(how, b""))
    if how == "gone":
        path.unlink()
    distil(world, *distill_flags(image_folder, teacher_file, cut_short, **SIX_STEPS))
    assert "config.yaml" in caplog.text and "written anew, from what step_00000003 holds" in caplog.text
    assert losses(cut_short) == losses(six_steps)
    assert yaml.safe_load(path.read_text()).keys() == yaml.safe_load(before).keys()


def test_a_rebuilt_config_still_guards_the_run(world, image_folder, teacher_file, cut_short):
    put(cut_short / "config.yaml", b"")
    with pytest.raises(InputError, match=r"another configuration .lr: 0.001 -> 0.002"):
        distil(world, *distill_flags(image_folder, teacher_file, cut_short, **SIX_STEPS, lr=2e-3))


@pytest.mark.fault(
    "metrics.jsonl holds bytes that are no UTF-8, bare numbers or junk, is a folder, a pipe or gone",
    "what can be read is kept; the run goes on and appends",
    tries=8,
)
@pytest.mark.parametrize("how", [*JUNK, "gone"])
def test_metrics_never_block_a_resume(world, image_folder, teacher_file, cut_short, six_steps, how):
    path = cut_short / "metrics.jsonl"
    kept = path.read_bytes()
    put(path, JUNK.get(how, b""))
    if how == "gone":
        path.unlink()
    elif how not in ("folder", "pipe"):
        path.write_bytes(kept + JUNK[how] + b"\n")
    distil(world, *distill_flags(image_folder, teacher_file, cut_short, **SIX_STEPS))
    expected = losses(six_steps)
    assert losses(cut_short) == (expected[3:] if how in ("folder", "pipe", "gone") else expected)


@pytest.mark.fault("index.npz of a run is empty, junk or a pipe", "code 2, one line names it")
@pytest.mark.parametrize("how", ["empty", "junk", "pipe"])
def test_a_damaged_index_is_named(image_folder, teacher_file, cut_short, how):
    put(cut_short / "index.npz", JUNK[how])
    code, output = run_forked("train", *distill_flags(image_folder, teacher_file, cut_short, **SIX_STEPS))
    assert code == EXIT_INPUT and "Traceback" not in output, output
    assert "index.npz" in output.splitlines()[-1]


@pytest.mark.fault(
    "the output folder, or metrics.jsonl, is removed while the run trains",
    "a warning; it trains on, and the next checkpoint makes the folder again",
)
@pytest.mark.parametrize("name", ["", "metrics.jsonl"])
def test_what_is_removed_while_running(image_folder, teacher_file, tmp_path, name):
    flags = distill_flags(image_folder, teacher_file, tmp_path / "run", epochs=300, checkpoint_minutes=0)
    run = start_forked("train", *flags)
    try:
        run.wait_for("step 3/")
        path = tmp_path / "run" / name
        if name:
            path.unlink()
        while path.is_dir():  # the run may write into it between two looks of rmtree
            shutil.rmtree(path, ignore_errors=True)
        run.wait_for("step 60/")
        os.kill(run.pid, signal.SIGTERM)
        output, _ = run.communicate(180)
        assert run.returncode == EXIT_TERMINATED and "Traceback" not in output, output
        assert last_step(tmp_path / "run") > 3
        if name:
            assert read_metrics(tmp_path / "run")[-1]["step"] == last_step(tmp_path / "run")
        else:
            assert "records can't be written, training goes on" in output
    finally:
        run.kill()
