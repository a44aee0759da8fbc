"""Continuing: after signals and kills, on other numbers of ranks, and what a continued run may not find changed."""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("deepspeed")

from support.programs import ROOT, distill_flags, run_training, start_forked
from support.rank_worker import FIRST_GREY, GREY_STEP, train_and_record
from support.runs import SIX_STEPS, Stopped, distil, last_step, losses, pretrain_flags, pretrain_mae, stopping
from tinymim_fast.errors import EXIT_TERMINATED, InputError
from tinymim_fast.models.checkpoints import read_weights
from tinymim_fast.tasks import pretrain
from tinymim_fast.training.metrics import read_metrics


def wait_for_checkpoint(process, output_dir, step):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if last_step(output_dir) >= step:
            return
        if process.poll() is not None:
            break
        time.sleep(0.005)
    process.kill()
    pytest.fail(f"no checkpoint of step {step}: {process.communicate()[0]}")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=lambda s: s.name)
def test_a_stopped_run_continues_with_the_same_losses(world, uninterrupted, image_folder, teacher_file, tmp_path, how):
    whole, changes = uninterrupted
    flags = distill_flags(image_folder, teacher_file, tmp_path / "run", **changes)
    process = start_forked("train", *flags)
    wait_for_checkpoint(process, tmp_path / "run", 5)
    os.kill(process.pid, how)
    output, _ = process.communicate(timeout=180)
    stopped_at = last_step(tmp_path / "run")
    if how == signal.SIGTERM:
        assert process.returncode == EXIT_TERMINATED, output
        assert f"stopped by SIGTERM at step {stopped_at}, saved" in output
        assert [r["step"] for r in read_metrics(tmp_path / "run")] == list(range(1, stopped_at + 1))
    assert 5 <= stopped_at < 48, "stopped before the end, or the test shows nothing"
    distil(world, *flags)
    assert [r["step"] for r in read_metrics(tmp_path / "run")] == list(range(1, 49))
    for part in ("loss", "qk", "vv", "lr"):
        assert losses(tmp_path / "run", part) == losses(whole, part)
    ours, theirs = read_weights(tmp_path / "run")[0], read_weights(whole)[0]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_another_configuration_in_the_folder_is_refused(world, uninterrupted, image_folder, teacher_file):
    folder, changes = uninterrupted
    with pytest.raises(InputError, match=r"another configuration \(lr: 0.001 -> 0.002\)"):
        distil(world, *distill_flags(image_folder, teacher_file, folder, **changes, lr=2e-3)[:])
    with pytest.raises(InputError, match='resume "none" wants a folder without checkpoints'):
        distil(world, *distill_flags(image_folder, teacher_file, folder, **changes, resume="none"))


@pytest.mark.fault("images are gone or new between stop and start", "refused; the numbers are named")
def test_images_that_changed_between_stop_and_start_are_noticed(world, uninterrupted, teacher_file, tmp_path):
    from tinymim_fast.data import draw_image_folder

    folder, changes = uninterrupted
    draw_image_folder(tmp_path / "other", num_train_per_class=7, num_val_per_class=1, size=48, seed=0)
    with pytest.raises(InputError, match="holds 112 images, not the 96"):
        distil(world, *distill_flags(tmp_path / "other", teacher_file, folder, **changes))


def test_pretraining_resumes_exactly(world, image_folder, tmp_path):
    changes = {"epochs": 2, "checkpoint_interval": 4}
    pretrain_mae(world, *pretrain_flags(image_folder, tmp_path / "whole", **changes))
    flags = pretrain_flags(image_folder, tmp_path / "cut", **changes)
    with pytest.raises(Stopped):
        pretrain_mae(world, *flags, build_task=stopping(pretrain.build_task, 4))
    pretrain_mae(world, *flags)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    ("stage", "bf16"), [(0, "true"), (0, "false"), (1, "true"), (1, "false"), (2, "false"), (3, "true"), (3, "false")]
)
def test_a_stage_resumes_exactly(world, image_folder, teacher_file, tmp_path, stage, bf16):
    """With drop path; stage 2 with bf16 is what `uninterrupted` holds."""
    base = {"zero_stage": stage, "bf16": bf16, "epochs": 2, "drop_path": 0.3, "weight_decay": 0.5}
    distil(world, *distill_flags(image_folder, teacher_file, tmp_path / "whole", **base))
    flags = distill_flags(image_folder, teacher_file, tmp_path / "cut", **base)
    train_and_record(world, None, 7, flags)
    distil(world, *flags)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for one, other in zip(*(read_weights(tmp_path / run)[0].items() for run in ("cut", "whole"))):
        assert torch.equal(one[1], other[1]), one[0]


@pytest.fixture(scope="module")
def numbered_images(tmp_path_factory):
    """24 noisy squares whose mean grey tells which it is, whatever is cropped, flipped or resized."""
    folder = tmp_path_factory.mktemp("numbered")
    (folder / "train" / "class").mkdir(parents=True)
    for number in range(24):
        noise = np.random.default_rng(number).normal(0, 12, (48, 48, 3))
        grey = (FIRST_GREY + GREY_STEP * number + noise - noise.mean()).round().clip(0, 255).astype(np.uint8)
        Image.fromarray(grey).save(folder / "train" / "class" / f"{number:02d}.png")
    return folder


# Losses of the same samples in another order of sums, fp32 and bf16 weights, after twelve steps.
RTOL_ORDER = {"false": 1e-4, "true": 0.02}
TWO = (2, 2, {"zero_stage": 2})  # ranks, step to stop at, changed flags
ONE = (1, 6, {"zero_stage": 1, "gradient_accumulation_steps": 3})
THREE = (3, 12, {"zero_stage": 1, "train_micro_batch_size_per_gpu": 1})


@pytest.mark.parametrize(
    ("bf16", "parts"),
    [
        ("false", (TWO, ONE, THREE)),
        pytest.param("true", ((3, 2, THREE[2]), (1, 12, ONE[2])), marks=pytest.mark.slow),
    ],
    ids=["fp32", "bf16"],
)
def test_a_run_continues_on_other_numbers_of_ranks(world, numbered_images, teacher_file, tmp_path, bf16, parts):
    """Each part with its own micro-batches and ZeRO stage: the losses and samples of one rank alone."""
    base = {"train_batch_size": 6, "epochs": 3, "drop_path": 0, "bf16": bf16, "clip_grad": 1.0}
    torchrun = Path(sys.executable).parent / "torchrun"

    def flags(name, **changes):
        return distill_flags(numbered_images, teacher_file, tmp_path / name, **base, **changes)

    (tmp_path / "records").mkdir()
    distil(world, *flags("whole"))
    for num_ranks, stop_at, changes in parts:
        if num_ranks == 1:
            train_and_record(world, tmp_path / "records", stop_at, flags("moved", **changes))
            continue
        code, output = run_training(
            *[torchrun, "--standalone", f"--nproc-per-node={num_ranks}", ROOT / "tests" / "support" / "rank_worker.py"],
            *["train", tmp_path / "records", stop_at, *flags("moved", **changes)],
        )
        assert code == 0, output
    np.testing.assert_allclose(losses(tmp_path / "moved"), losses(tmp_path / "whole"), rtol=RTOL_ORDER[bf16])
    seen = []
    for num_ranks, _, _ in parts:
        files = sorted((tmp_path / "records").glob(f"from_{num_ranks}_ranks_*.txt"))
        assert len(files) == num_ranks
        seen.append(np.concatenate([np.loadtxt(file, ndmin=2) for file in files], axis=1).reshape(-1, 6))
    epochs = np.concatenate(seen).reshape(3, 24)
    assert (np.sort(epochs) == np.arange(24)).all(), epochs
    assert (epochs[0] != epochs[1]).any() and (epochs[1] != epochs[2]).any()


@pytest.mark.fault(
    "the teacher's file is replaced by other weights, or a run that is the teacher went on, between stop and start",
    "refused, both are named; the same file under another name is taken",
)
def test_the_teacher_is_known_by_its_checksum(world, image_folder, teacher_file, tmp_path, six_steps):
    shutil.copytree(six_steps, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000006")
    other = torch.load(teacher_file)
    other["model"]["cls_token"] += 1
    torch.save(other, tmp_path / teacher_file.name)
    with pytest.raises(
        InputError, match=r"--teacher-checkpoint: is mae_pretrain.pth .sha256 \w{12}., and this run began with"
    ):
        distil(world, *distill_flags(image_folder, tmp_path / teacher_file.name, tmp_path / "run", **SIX_STEPS))
    shutil.copy(teacher_file, tmp_path / "moved.pth")
    distil(world, *distill_flags(image_folder, tmp_path / "moved.pth", tmp_path / "run", **SIX_STEPS))
    assert losses(tmp_path / "run") == losses(six_steps)


def test_a_damaged_teacher_is_refused(world, image_folder, tmp_path, six_steps):
    shutil.copytree(six_steps, tmp_path / "teacher")
    path = tmp_path / "teacher" / "checkpoints" / "step_00000006" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 4
    path.write_bytes(content)
    changes = {"teacher_model": None, "teacher_model_kwargs": None}
    with pytest.raises(
        InputError, match=r"--teacher-checkpoint: .*step_00000006/model.safetensors is not what was saved"
    ):
        distil(world, *distill_flags(image_folder, tmp_path / "teacher", tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
