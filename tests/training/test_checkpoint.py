"""Saving: whole or not at all, and what is kept."""

import pytest
import safetensors

pytest.importorskip("deepspeed")

from support.programs import distill_flags
from support.runs import distil, losses
from tinymim_fast import files
from tinymim_fast.errors import InputError
from tinymim_fast.training import checkpoint


@pytest.mark.parametrize("error", [OSError, safetensors.SafetensorError])
def test_full_disk_while_saving_keeps_the_last_checkpoint(
    world, image_folder, teacher_file, tmp_path, monkeypatch, error
):
    saves = []

    def full_the_second_time(folder, state, info):
        saves.append(folder)
        if len(saves) == 2:
            (folder / "model.safetensors").write_bytes(b"half")
            raise error("No space left on device")
        save_weights(folder, state, info)

    save_weights = checkpoint.save_weights
    monkeypatch.setattr(checkpoint, "save_weights", full_the_second_time)
    flags = distill_flags(image_folder, teacher_file, tmp_path / "run", checkpoint_interval=4)
    with pytest.raises(
        InputError,
        match=r"step 8 can't be saved \(\d+ MiB are free\): .*No space left.*last good one is .*step_00000004",
    ):
        distil(world, *flags)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000004"]
    distil(world, *flags)
    assert len(losses(tmp_path / "run")) == 18


def test_unfinished_checkpoints_of_a_killed_run_are_not_taken(world, image_folder, teacher_file, tmp_path):
    flags = distill_flags(image_folder, teacher_file, tmp_path / "run", epochs=1)
    (tmp_path / "run" / "checkpoints" / "tmp_step_00000003").mkdir(parents=True)
    distil(world, *flags)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000006"]


def test_an_old_checkpoint_that_cant_be_removed_is_a_warning(
    world, image_folder, teacher_file, tmp_path, monkeypatch, caplog
):
    def refuse(path):
        raise OSError("Device or resource busy")

    monkeypatch.setattr(checkpoint, "remove_folder", refuse)
    flags = distill_flags(
        image_folder, teacher_file, tmp_path / "run", checkpoint_interval=3, checkpoint_hist=1, epochs=1
    )
    distil(world, *flags)
    assert "step_00000003: this old checkpoint can't be removed: Device or resource busy" in caplog.text
    assert len(losses(tmp_path / "run")) == 6


def test_pruning_leaves_what_is_no_checkpoint(world, image_folder, teacher_file, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    for name in ("step_00000001_backup", "step_backup"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_bytes(b"a user's copy")
    (folder / "step_00000002").write_text("a file")
    flags = distill_flags(
        image_folder, teacher_file, tmp_path / "run", checkpoint_interval=2, checkpoint_hist=1, epochs=1
    )
    distil(world, *flags)
    names = {p.name for p in folder.iterdir()}
    assert names >= {"step_00000001_backup", "step_backup", "step_00000006"}
    assert "step_00000004" not in names and [n for n in names if n.startswith("aside_step_00000002_")]


def test_a_folder_is_renamed_before_it_is_removed(tmp_path, monkeypatch):
    """What a kill in between leaves is no checkpoint, and the next start removes it."""
    old = tmp_path / "step_00000001"
    old.mkdir()
    (old / "model.safetensors").write_bytes(b"weights")

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.rmtree", killed)
        files.remove_folder(old)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("tmp_") and left.name.endswith("step_00000001")
    files.remove_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == []
