"""Programs: one line and an exit code for what went wrong, and no wait for torch where none is needed."""

import subprocess
import sys

import pytest

pytest.importorskip("deepspeed")

from support.programs import PACKAGE, ROOT, distill_flags, run_forked, run_training, start_ranks
from support.runs import pretrain_flags
from tinymim_fast.errors import EXIT_INPUT, EXIT_NON_FINITE
from tinymim_fast.models.checkpoints import latest_checkpoint


@pytest.mark.fault("the loss becomes NaN or Inf", "code 3; step, rank and the last good checkpoint are named")
def test_non_finite_loss_names_step_rank_and_last_good_checkpoint(image_folder, teacher_file, tmp_path):
    flags = distill_flags(
        image_folder, teacher_file, tmp_path / "run", lr=1e30, warmup_epochs=0, checkpoint_interval=1, bf16="false"
    )
    code, output = run_forked("train", *flags)
    assert code == EXIT_NON_FINITE, output
    last = [line for line in output.splitlines() if "last good checkpoint" in line]
    assert len(last) == 1 and "at step 2 on rank 0" in last[0] and "step_00000001" in last[0], output
    assert latest_checkpoint(tmp_path / "run").name == "step_00000001"


def test_bad_input_is_one_line_and_an_exit_code(image_folder, teacher_file, tmp_path):
    flags = distill_flags(image_folder, teacher_file, tmp_path / "run", target_block=9)
    code, output = run_training(sys.executable, PACKAGE / "train.py", *flags)
    assert code == EXIT_INPUT and "Traceback" not in output
    assert output.splitlines()[-1].startswith("train.py: --target-block: got 9")
    code, output = run_forked("pretrain", "--nonsense=1")
    assert code == EXIT_INPUT and output.splitlines()[-1].startswith("pretrain.py: ") and "nonsense" in output


@pytest.mark.fault(
    "an error on all of two ranks: bad input of one or of each, a loss that is no number",
    "both end with its code, whoever is faster; bad input is one line",
)
@pytest.mark.parametrize(
    ("program", "changes", "code"),
    [
        ("train", {"target_block": 9}, EXIT_INPUT),
        ("pretrain", {"data_path": "/nowhere"}, EXIT_INPUT),
        pytest.param("train", {"data_path": "/nowhere"}, EXIT_INPUT, marks=pytest.mark.slow),
        pytest.param("train", {"lr": 1e30, "warmup_epochs": 0}, EXIT_NON_FINITE, marks=pytest.mark.slow),
        pytest.param("pretrain", {"lr": 1e30, "warmup_epochs": 0}, EXIT_NON_FINITE, marks=pytest.mark.slow),
        pytest.param("pretrain", {"epochs": 1}, 0, marks=pytest.mark.slow),
    ],
)
def test_ranks_end_together(image_folder, teacher_file, tmp_path, program, changes, code):
    if program == "train":
        flags = distill_flags(image_folder, teacher_file, tmp_path / "run", **changes)
    else:
        flags = pretrain_flags(image_folder, tmp_path / "run", **changes)
    runs = start_ranks(program, *flags)
    try:
        outputs = [run.communicate(120)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [code] * 2, outputs
    assert not any("Traceback" in output or "frame #" in output for output in outputs), outputs
    said = [line for output in outputs for line in output.splitlines() if line.startswith(f"{program}.py: ")]
    assert len(said) == 1 or code != EXIT_INPUT, outputs


@pytest.mark.parametrize("program", ["train.py", "pretrain.py"])
def test_help_waits_for_neither_torch_nor_deepspeed(program):
    watch = f"""
import atexit, runpy, sys
heavy = ("torch", "deepspeed", "timm", "numpy")
atexit.register(lambda: print("loaded:", [name for name in heavy if name in sys.modules]))
sys.argv = [{program!r}, "--help"]
runpy.run_path({str(PACKAGE / program)!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", watch], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "--train_batch_size" in done.stdout and "loaded: []" in done.stdout, done.stdout
