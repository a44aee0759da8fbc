"""What kills, full disks and changes of scale cost: nothing. `python tests/soak.py` tries many more of each."""

import random

import pytest

pytest.importorskip("deepspeed")

from support import kills
from support.programs import distill_flags, run_forked, start_forked, start_ranks
from tinymim_fast.errors import EXIT_INPUT
from tinymim_fast.models.checkpoints import list_checkpoints


@pytest.mark.fault(
    "SIGKILL while a checkpoint is written, to one rank or two",
    "what was saved stays; the same command goes on, bitwise as if undisturbed",
    tries=8,
)
@pytest.mark.parametrize(("ranks", "count"), [(1, 5), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_kills_while_a_checkpoint_is_written(image_folder, teacher_file, tmp_path, ranks, count):
    """SIGKILL within 8 ms of the first byte of a checkpoint; the same command goes on as if nothing had happened."""
    changes = {"checkpoint_interval": 1, "epochs": 3, "zero_stage": 2}

    def starter(output_dir):
        flags = distill_flags(image_folder, teacher_file, output_dir, **changes)
        return lambda: [start_forked("train", *flags)] if ranks == 1 else start_ranks("train", *flags, ranks=ranks)

    kills.run_to_end(starter(tmp_path / "whole"))
    tally, rng = kills.Tally(), random.Random(ranks)
    while tally.kills < count and (not tally.steps or tally.steps[-1] < 15):
        kills.kill_in_writing(starter(tmp_path / "killed"), tmp_path / "killed", rng, tally)
    kills.run_to_end(starter(tmp_path / "killed"))
    kills.assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert tally.in_writing, "no kill fell into the writing: this test shows nothing"


@pytest.mark.fault(
    "the disk is full while a checkpoint is written",
    "one line, code 2, the checkpoint before stays; with space again the same command goes on, bitwise",
)
@pytest.mark.parametrize("share", [0.0, 0.7])
def test_a_disk_that_fills_while_a_checkpoint_is_written(image_folder, teacher_file, tmp_path, share):
    """Room for one checkpoint and `share` of the next; with space again, the same command goes on."""
    changes = {"checkpoint_interval": 2, "epochs": 1, "warmup_epochs": 0, "checkpoint_hist": 3}
    whole = tmp_path / "whole"
    code, output = run_forked("train", *distill_flags(image_folder, teacher_file, whole, **changes))
    assert code == 0, output
    needs = kills.kib_of(whole, num_checkpoints=1 + share)
    try:
        with kills.small_disk(tmp_path / "disk", needs) as disk:
            flags = distill_flags(image_folder, teacher_file, disk / "run", **changes)
            code, output = run_forked("train", *flags)
            assert code == EXIT_INPUT and "can't be saved" in output and "Traceback" not in output, output
            assert [path.name for path in list_checkpoints(disk / "run")] == ["step_00000002"]
            kills.assert_complete(disk / "run")
            assert not list((disk / "run" / "checkpoints").glob("tmp_*"))
            kills.resize(disk, 4 * needs)
            code, output = run_forked("train", *flags)
            assert code == 0, output
            kills.assert_same_run(disk / "run", whole)
    except PermissionError as error:
        pytest.skip(f"this process may not mount a small disk: {error}")


@pytest.mark.fault("another number of ranks, ZeRO stage and micro-batch", "losses to 2 %, every step once", tries=2)
@pytest.mark.parametrize("scales", [[(1, 1, 16), (2, 2, 4), (1, 0, 8)]])
def test_a_run_goes_on_at_another_scale(image_folder, teacher_file, tmp_path, scales):
    """Killed and started with other (ranks, ZeRO stage, micro-batch): the curve of a run that nobody disturbed."""
    base = {"drop_path": 0, "epochs": 3}
    kills.run_to_end(
        lambda: [start_forked("train", *distill_flags(image_folder, teacher_file, tmp_path / "whole", **base))]
    )
    worst = kills.change_scale(
        lambda **scale: distill_flags(image_folder, teacher_file, tmp_path / "run", **base, **scale),
        scales,
        every=6,
        output_dir=tmp_path / "run",
        reference=tmp_path / "whole",
    )
    assert worst < 0.02
