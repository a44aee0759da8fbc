"""Whole runs: what is trained and what is kept, ranks, resume, signals, bad input."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from PIL import Image

pytest.importorskip("deepspeed")

import tinymim_fast.training.loop as training
from support.programs import DEEPSPEED, PACKAGE, ROOT, TINY, distill_flags, run_training, start_training
from support.rank_worker import FIRST_GREY, GREY_STEP, train_and_record
from tinymim_fast import pretrain, train
from tinymim_fast.config import DistillConfig, PretrainConfig, parse
from tinymim_fast.distributed import free_port
from tinymim_fast.errors import EXIT_INPUT, EXIT_NON_FINITE, EXIT_TERMINATED, InputError, NonFiniteLossError
from tinymim_fast.models.checkpoints import latest_checkpoint, read_weights
from tinymim_fast.models.vit import create_vit, init_mae_style
from tinymim_fast.training.metrics import read_metrics


def distil(world, *flags):
    training.train(parse(DistillConfig, flags, "train.py"), world, train.build_task)


def losses(output_dir, part="loss"):
    return [r[part] for r in read_metrics(output_dir)]


# Losses of the same samples in another order of sums, fp32 and bf16 weights, after twelve steps.
RTOL_ORDER = {"false": 1e-4, "true": 0.02}
UNREACHED = ("attn.proj.", "norm2.", "mlp.")


@pytest.mark.parametrize(("stage", "bf16"), [(0, "true"), (1, "true"), (2, "true"), (1, "false")])
def test_what_the_loss_cant_reach_keeps_its_exact_values(world, image_folder, teacher_file, tmp_path, stage, bf16):
    """And all that it reaches moves; both are in the checkpoint, in fp32."""
    flags = distill_flags(
        image_folder, teacher_file, tmp_path / "run", zero_stage=stage, bf16=bf16, weight_decay=0.5, lr=1e-2
    )
    distil(world, *flags)
    state, info = read_weights(tmp_path / "run")
    torch.manual_seed(0)
    initial = create_vit("vit_tiny_patch16_224", img_size=32, **TINY)
    init_mae_style(initial, pos_embed="sincos")
    kept = {
        name
        for name, tensor in initial.state_dict().items()
        if tensor.dtype == state[name].dtype and torch.equal(tensor, state[name])
    }
    last = {n for n in state if n.startswith("blocks.2.") and n.removeprefix("blocks.2.").startswith(UNREACHED)}
    assert len(last) == 8
    assert kept == last | {"norm.weight", "norm.bias", "pos_embed"}
    assert info.head_layout == {"embed_dim": 48, "num_heads": [3] * 3, "relation_heads": 3, "teacher_block": 3}
    assert info.step == 18 and info.epoch == 3.0 and info.recipe["zero_stage"] == stage
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


def test_ranks_zero_stages_and_accumulation_train_the_same_way(world, image_folder, teacher_file, tmp_path):
    """One process, one that accumulates, and two under the launcher, which find no compiler: one loss curve.

    drop_path is 0: its draws belong to a rank. bf16 rounds each weight to 8 bits, in another order of sums.
    """
    base = {"drop_path": 0, "epochs": 4}
    distil(world, *distill_flags(image_folder, teacher_file, tmp_path / "one", **base))
    distil(
        world,
        *distill_flags(
            image_folder, teacher_file, tmp_path / "accum", gradient_accumulation_steps=4, zero_stage=0, **base
        ),
    )
    one = np.array(losses(tmp_path / "one"))
    assert one[-3:].mean() < 0.8 * one[:3].mean(), "the comparison below needs a curve that moves"
    np.testing.assert_allclose(losses(tmp_path / "accum"), one, rtol=0.02)
    for stage in (1, 2):
        code, output = run_training(
            DEEPSPEED,
            "--num_accelerators=2",
            f"--master_port={free_port()}",
            PACKAGE / "train.py",
            *distill_flags(
                image_folder, teacher_file, tmp_path / f"two{stage}", zero_stage=stage, loader="auto", **base
            ),
            path=str(Path(sys.executable).parent),  # no g++, no c++
        )
        assert code == 0, output
        np.testing.assert_allclose(losses(tmp_path / f"two{stage}"), one, rtol=0.02)


def wait_for_checkpoint(process, output_dir, step):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        latest = latest_checkpoint(output_dir)
        if latest is not None and int(latest.name.removeprefix("step_")) >= step:
            return
        if process.poll() is not None:
            break
        time.sleep(0.05)
    process.kill()
    pytest.fail(f"no checkpoint of step {step}: {process.communicate()[0]}")


@pytest.fixture(scope="module")
def uninterrupted(world, image_folder, teacher_file, tmp_path_factory):
    """A run that nobody disturbs, with drop path and jitter, and its flags."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    changes = {"epochs": 8, "checkpoint_interval": 5, "zero_stage": 2, "tensorboard": "true"}
    distil(world, *distill_flags(image_folder, teacher_file, folder / "run", **changes))
    return folder / "run", changes


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=lambda s: s.name)
def test_a_stopped_run_continues_with_the_same_losses(world, uninterrupted, image_folder, teacher_file, tmp_path, how):
    whole, changes = uninterrupted
    flags = distill_flags(image_folder, teacher_file, tmp_path / "run", **changes)
    process = start_training(sys.executable, PACKAGE / "train.py", *flags)
    wait_for_checkpoint(process, tmp_path / "run", 5)
    os.kill(process.pid, how)
    output, _ = process.communicate(timeout=60)
    stopped_at = int(latest_checkpoint(tmp_path / "run").name.removeprefix("step_"))
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


def test_what_a_run_leaves(uninterrupted):
    folder, _ = uninterrupted
    assert {p.name for p in folder.iterdir()} == {
        "checkpoints", "config.yaml", "curves.png", "deepspeed_config.json", "index.npz", "metrics.jsonl", "tensorboard"
    }  # fmt: skip
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == ["step_00000045", "step_00000048"]
    record = read_metrics(folder)[3]
    assert set(record) == {"step", "epoch", "loss", "qk", "vv", "lr", "images_per_s", "data_wait", "time"}
    assert record["loss"] == pytest.approx(record["qk"] + record["vv"], rel=1e-5)
    assert record["lr"] == pytest.approx(1e-3 * 3 / 6) and record["epoch"] == pytest.approx(4 / 6, abs=1e-4)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").glob("events.*"))


def test_a_finished_run_does_nothing_more(world, uninterrupted, image_folder, teacher_file):
    folder, changes = uninterrupted
    before = (folder / "metrics.jsonl").read_text()
    distil(world, *distill_flags(image_folder, teacher_file, folder, **changes))
    assert (folder / "metrics.jsonl").read_text() == before


def test_another_configuration_in_the_folder_is_refused(world, uninterrupted, image_folder, teacher_file):
    folder, changes = uninterrupted
    with pytest.raises(InputError, match=r"another configuration \(lr: 0.001 -> 0.002\)"):
        distil(world, *distill_flags(image_folder, teacher_file, folder, **changes, lr=2e-3)[:])
    with pytest.raises(InputError, match="--resume none wants a folder without checkpoints"):
        distil(world, *distill_flags(image_folder, teacher_file, folder, **changes, resume="none"))


def test_images_that_changed_between_stop_and_start_are_noticed(world, uninterrupted, teacher_file, tmp_path):
    from tinymim_fast.data import draw_image_folder

    folder, changes = uninterrupted
    draw_image_folder(tmp_path / "other", num_train_per_class=7, num_val_per_class=1, size=48, seed=0)
    with pytest.raises(InputError, match="holds 112 images, not the 96"):
        distil(world, *distill_flags(tmp_path / "other", teacher_file, folder, **changes))


def test_non_finite_loss_names_step_rank_and_last_good_checkpoint(image_folder, teacher_file, tmp_path):
    flags = distill_flags(
        image_folder, teacher_file, tmp_path / "run", lr=1e30, warmup_epochs=0, checkpoint_interval=1, bf16="false"
    )
    code, output = run_training(sys.executable, PACKAGE / "train.py", *flags)
    assert code == EXIT_NON_FINITE, output
    last = [line for line in output.splitlines() if "last good checkpoint" in line]
    assert len(last) == 1 and "at step 2 on rank 0" in last[0] and "step_00000001" in last[0], output
    assert latest_checkpoint(tmp_path / "run").name == "step_00000001"


def test_a_bad_loss_is_found_at_the_next_report(world, image_folder, teacher_file, tmp_path, monkeypatch):
    """The host looks at losses every `log_interval` steps only, and then names the step that was bad."""
    build = train.build_task

    def build_broken(*args):
        task = build(*args)
        forward, calls = task.model.forward, []

        def broken(*inputs):
            calls.append(1)
            out = forward(*inputs)
            return {**out, "qk": out["qk"] * float("nan")} if len(calls) == 9 else out

        task.model.forward = broken
        return task

    flags = distill_flags(image_folder, teacher_file, tmp_path / "run", log_interval=6, checkpoint_interval=4)
    with pytest.raises(NonFiniteLossError, match=r"at step 9 on rank 0; the last good checkpoint is .*step_00000008"):
        training.train(parse(DistillConfig, flags, "p"), world, build_broken)


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

    save_weights = training.save_weights
    monkeypatch.setattr(training, "save_weights", full_the_second_time)
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


def damaged_teacher(tmp_path, image_folder):
    path = tmp_path / "bad.pth"
    path.write_text("no")
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_path": "/no/such/folder"}, "--data-path: got /no/such/folder"),
        ({"data_path": "EMPTY"}, "--data-path: got .*is empty"),
        ({"data_path": "NO_IMAGES"}, "--data-path: got .*has no images"),
        ({"teacher_checkpoint": "/no/such/file.pth"}, "--teacher-checkpoint /no/such/file.pth: no such checkpoint"),
        ({"teacher_checkpoint": "TEXT"}, "not a checkpoint that can be read"),
        (
            {"teacher_model_kwargs": json.dumps({**TINY})},
            r"cls_token is \(1, 1, 96\) in the file, \(1, 1, 48\) in the model",
        ),
        ({"target_block": 4}, "--target-block: got 4, want 1 to 3"),
        ({"relation_heads": 5}, "--relation-heads: got 5, want a number that divides the student's width 48"),
        ({"train_batch_size": 16, "train_micro_batch_size_per_gpu": 5}, "--train-batch-size: got 16"),
        ({"train_batch_size": 97}, "--train-batch-size: got 97 images a step for 96 images"),
        ({"student_model": "resnet18"}, "--student-model resnet18"),
        ({"student_model_kwargs": json.dumps({**TINY, "reg_tokens": 4})}, "student has 21 tokens.*teacher 17"),
        ({"deepspeed_config": "/no/ds.json"}, "--deepspeed-config /no/ds.json"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named_and_nothing_is_written(world, image_folder, teacher_file, tmp_path, changes, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pth").write_text("no checkpoint")
    (tmp_path / "no_images" / "class").mkdir(parents=True)
    (tmp_path / "no_images" / "class" / "readme.txt").write_text("no image")
    stand_ins = {"NO_IMAGES": tmp_path / "no_images", "EMPTY": tmp_path / "empty", "TEXT": tmp_path / "text.pth"}
    changes = {k: stand_ins.get(v, v) for k, v in changes.items()}
    with pytest.raises(InputError, match=message):
        distil(world, *distill_flags(image_folder, teacher_file, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_bad_input_is_one_line_and_an_exit_code(image_folder, teacher_file, tmp_path):
    flags = distill_flags(image_folder, teacher_file, tmp_path / "run", target_block=9)
    code, output = run_training(sys.executable, PACKAGE / "train.py", *flags)
    assert code == EXIT_INPUT and "Traceback" not in output
    assert output.splitlines()[-1].startswith("train.py: --target-block: got 9")
    code, output = run_training(sys.executable, PACKAGE / "pretrain.py", "--nonsense=1")
    assert code == EXIT_INPUT and output.splitlines()[-1].startswith("pretrain.py: ") and "nonsense" in output


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_pretraining_under_launchers_gives_a_teacher(world, image_folder, tmp_path, launcher):
    """Two ranks pre-train; the checkpoint resumes exactly; the teacher needs no description."""
    flags = [
        f"--data-path={image_folder}",
        f"--output-dir={tmp_path / 'teacher'}",
        f"--model-kwargs={json.dumps(TINY)}",
        *[
            "--model=vit_tiny_patch16_224",
            "--decoder-embed-dim=32",
            "--decoder-depth=1",
            "--decoder-num-heads=2",
            "--img-size=32",
        ],
        *[
            "--epochs=3",
            "--warmup-epochs=1",
            "--train-batch-size=16",
            "--lr=1e-3",
            "--log-interval=1",
            "--workers=1",
            "--tensorboard=false",
        ],
        "--loader=torchvision",
        "--bf16=false",
    ]
    torchrun = Path(sys.executable).parent / "torchrun"
    starts = {
        "torchrun": [torchrun, "--standalone", "--nproc-per-node=2"],
        "deepspeed": [DEEPSPEED, "--num_accelerators=2", f"--master_port={free_port()}"],
    }
    code, output = run_training(*starts[launcher], PACKAGE / "pretrain.py", *flags)
    assert code == 0, output
    curve = losses(tmp_path / "teacher")
    assert len(curve) == 18 and curve[-1] < curve[0]
    state, info = read_weights(tmp_path / "teacher")
    assert info.kind == "mae" and "decoder_pred.weight" in state and "blocks.2.mlp.fc2.weight" in state
    if launcher == "torchrun":
        student = distill_flags(
            image_folder,
            tmp_path / "teacher",
            tmp_path / "student",
            teacher_model=None,
            teacher_model_kwargs="{}",
            epochs=1,
        )
        distil(world, *student)
        assert read_weights(tmp_path / "student")[1].recipe["teacher_model"] is None


def test_pretraining_resumes_exactly(world, image_folder, tmp_path):
    def run(folder):
        flags = [
            f"--data-path={image_folder}",
            f"--output-dir={folder}",
            f"--model-kwargs={json.dumps(TINY)}",
            *["--model=vit_tiny_patch16_224", "--decoder-embed-dim=32", "--decoder-depth=1", "--decoder-num-heads=2"],
            *[
                "--img-size=32",
                "--epochs=2",
                "--warmup-epochs=1",
                "--train-batch-size=16",
                "--lr=1e-3",
                "--log-interval=1",
            ],
            *["--workers=1", "--tensorboard=false", "--checkpoint-interval=4", "--loader=torchvision"],
        ]
        training.train(parse(PretrainConfig, flags, "p"), world, pretrain.build_task)

    run(tmp_path / "whole")
    real = training.Run._save

    def stop_after_first(self):
        real(self)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.Run, "_save", stop_after_first)
        run(tmp_path / "cut")
    run(tmp_path / "cut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.parametrize(("stage", "bf16"), [(0, "true"), (0, "false"), (1, "true"), (1, "false"), (2, "false")])
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


TWO = (2, 2, {"zero_stage": 2})  # ranks, step to stop at, changed flags
ONE = (1, 6, {"zero_stage": 1, "gradient_accumulation_steps": 3})
THREE = (3, 12, {"zero_stage": 1, "train_micro_batch_size_per_gpu": 1})


@pytest.mark.parametrize(
    ("bf16", "parts"),
    [("false", (TWO, ONE, THREE)), ("true", ((3, 2, THREE[2]), (1, 12, ONE[2])))],
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


def test_learning_rate_schedule(image_folder, teacher_file, tmp_path):
    flags = distill_flags(
        image_folder, teacher_file, tmp_path, lr=None, lr_base=1e-3, train_batch_size=512, min_lr=1e-5
    )
    config = parse(DistillConfig, [*flags, "--epochs=10", "--warmup-epochs=2"], "p")
    lr_at = training.lr_schedule(config, 100)
    assert lr_at(0) == 0
    assert lr_at(100) == pytest.approx(1e-3)  # half of the warm-up, peak 2e-3 by the linear rule
    assert lr_at(200) == pytest.approx(2e-3)
    assert lr_at(600) == pytest.approx((2e-3 + 1e-5) / 2)
    assert lr_at(1000) == pytest.approx(1e-5)
