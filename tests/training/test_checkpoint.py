"""Saving: whole or not at all, and what is kept."""

import shutil
import subprocess

import pytest
import safetensors
from safetensors.torch import load_file

pytest.importorskip("deepspeed")

from support.programs import distill_flags
from support.runs import SIX_STEPS, distil, losses
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


@pytest.mark.fault(
    "a copy, an empty folder or half a checkpoint in `checkpoints/`", "never resumed from, exported or deleted"
)
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


@pytest.mark.fault(
    "a copy, an empty folder or half a checkpoint in `checkpoints/`", "never resumed from, exported or deleted"
)
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


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def zero_a_page(path):
    content = bytearray(path.read_bytes())
    content[-4096:] = bytes(4096)
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def take_that_of_the_step_before(path):
    path.write_bytes((path.parent.parent / "step_00000003" / path.name).read_bytes())


def remove(path):
    path.unlink()


@pytest.mark.fault(
    "the newest checkpoint is damaged: a flipped bit, a zeroed page, cut off, missing, or a file of another step",
    "it is named and set aside; the run goes on from the one before, bitwise as if undisturbed",
)
@pytest.mark.parametrize("damage", [flip_a_bit, zero_a_page, cut, take_that_of_the_step_before, remove])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_damaged_checkpoint_is_not_gone_on_from(
    world, image_folder, teacher_file, tmp_path, six_steps, caplog, damage, name
):
    shutil.copytree(six_steps, tmp_path / "run")
    damage(tmp_path / "run" / "checkpoints" / "step_00000006" / name)
    distil(world, *distill_flags(image_folder, teacher_file, tmp_path / "run", **SIX_STEPS))
    assert losses(tmp_path / "run") == losses(six_steps)
    folder = tmp_path / "run" / "checkpoints"
    for one, other in zip(
        *(load_file(run / "checkpoints/step_00000006" / name).values() for run in (six_steps, folder.parent))
    ):
        assert one.equal(other)
    if (damage, name) != (remove, "model.safetensors"):  # no checkpoint at all: see list_checkpoints
        assert "step_00000006 is damaged, " in caplog.text and "going on from step_00000003 instead" in caplog.text
        assert name in caplog.text
    assert [path.name for path in folder.iterdir() if path.name.startswith("aside_step_00000006_")]


def test_without_verifying_a_flipped_bit_is_not_seen(world, image_folder, teacher_file, tmp_path, six_steps):
    """What `verify_checkpoints=false` costs."""
    shutil.copytree(six_steps, tmp_path / "run")
    flip_a_bit(tmp_path / "run" / "checkpoints" / "step_00000006" / "model.safetensors")
    flags = distill_flags(image_folder, teacher_file, tmp_path / "run", **SIX_STEPS, verify_checkpoints="false")
    distil(world, *flags)
    assert not list((tmp_path / "run" / "checkpoints").glob("aside_*"))


def test_damaged_checkpoints_alone_are_an_error_that_changes_nothing(
    world, image_folder, teacher_file, tmp_path, six_steps
):
    shutil.copytree(six_steps, tmp_path / "run")
    for step in (3, 6):
        flip_a_bit(tmp_path / "run" / "checkpoints" / f"step_{step:08d}" / "optimizer.safetensors")
    before = {*tmp_path.rglob("*"), tmp_path / "run" / "run.lock"}
    with pytest.raises(
        InputError, match=r"every checkpoint is damaged: .*step_00000006 \(optimizer.safetensors is not"
    ):
        distil(world, *distill_flags(image_folder, teacher_file, tmp_path / "run", **SIX_STEPS))
    assert {*tmp_path.rglob("*")} == before


def test_a_checkpoint_of_before_there_were_checksums_is_gone_on_from(
    world, image_folder, teacher_file, tmp_path, six_steps
):
    shutil.copytree(six_steps, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000006")
    (tmp_path / "run" / "checkpoints" / "step_00000003" / "SHA256SUMS").unlink()
    distil(world, *distill_flags(image_folder, teacher_file, tmp_path / "run", **SIX_STEPS))
    assert losses(tmp_path / "run") == losses(six_steps)


def test_sha256sum_reads_the_list(six_steps):
    folder = six_steps / "checkpoints" / "step_00000006"
    done = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK") == 2, done.stderr
