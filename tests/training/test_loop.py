"""Whole runs: what is trained, what is reported, bad input."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("deepspeed")

from support.programs import DEEPSPEED, PACKAGE, TINY, distill_flags, run_training
from support.runs import distil, losses, pretrain_flags
from tinymim_fast.distributed import free_port
from tinymim_fast.errors import InputError, NonFiniteLossError
from tinymim_fast.models.checkpoints import read_weights
from tinymim_fast.models.vit import create_vit, init_mae_style
from tinymim_fast.tasks import distill
from tinymim_fast.training.metrics import read_metrics

UNREACHED = ("attn.proj.", "norm2.", "mlp.")


@pytest.mark.parametrize(("stage", "bf16"), [(0, "true"), (1, "true"), (2, "true"), (1, "false"), (3, "true")])
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


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_zero_stages_and_accumulation_train_the_same_way(world, image_folder, teacher_file, tmp_path, stage):
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
    code, output = run_training(
        DEEPSPEED,
        "--num_accelerators=2",
        f"--master_port={free_port()}",
        PACKAGE / "train.py",
        *distill_flags(image_folder, teacher_file, tmp_path / "two", zero_stage=stage, loader="auto", **base),
        path=str(Path(sys.executable).parent),  # no g++, no c++
    )
    assert code == 0, output
    np.testing.assert_allclose(losses(tmp_path / "two"), one, rtol=0.02)


def test_what_a_run_leaves(uninterrupted):
    folder, _ = uninterrupted
    assert {p.name for p in folder.iterdir()} == {
        "checkpoints", "config.yaml", "curves.png", "deepspeed_config.json", "index.npz", "metrics.jsonl", "run.lock",
        "tensorboard"
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


@pytest.mark.fault("the loss becomes NaN or Inf", "code 3; step, rank and the last good checkpoint are named")
def test_a_bad_loss_is_found_at_the_next_report(world, image_folder, teacher_file, tmp_path, monkeypatch):
    """The host looks at losses every `log_interval` steps only, and then names the step that was bad."""

    def build_broken(*args):
        task = distill.build_task(*args)
        forward, calls = task.model.forward, []

        def broken(*inputs):
            calls.append(1)
            out = forward(*inputs)
            return {**out, "qk": out["qk"] * float("nan")} if len(calls) == 9 else out

        task.model.forward = broken
        return task

    flags = distill_flags(image_folder, teacher_file, tmp_path / "run", log_interval=6, checkpoint_interval=4)
    with pytest.raises(NonFiniteLossError, match=r"at step 9 on rank 0; the last good checkpoint is .*step_00000008"):
        distil(world, *flags, build_task=build_broken)


@pytest.mark.parametrize(
    ("stage", "bad_step"),
    [(0, 9), (1, 9), (2, 9), (3, 9), (1, 18), pytest.param(3, 18, marks=pytest.mark.slow)],
)
def test_a_gradient_that_is_not_finite_ends_the_run_at_every_stage(
    world, image_folder, teacher_file, tmp_path, stage, bad_step
):
    """With a finite loss: the step is not dropped in silence; the next loss tells, or the weights at the last step."""

    def build_broken(*args):
        task = distill.build_task(*args)
        forward, calls = task.model.forward, []

        def broken(*inputs):
            calls.append(1)
            out = forward(*inputs)
            if len(calls) == bad_step:
                out["loss"] = out["loss"] + (out["loss"] - out["loss"].detach()).sqrt()  # adds 0, whose gradient is inf
            return out

        task.model.forward = broken
        return task

    flags = distill_flags(image_folder, teacher_file, tmp_path / "run", zero_stage=stage, checkpoint_interval=4)
    where = "the loss is not finite at step 10" if bad_step == 9 else "is not finite after step 18"
    good = "step_00000008" if bad_step == 9 else "step_00000016"
    with pytest.raises(NonFiniteLossError, match=rf"{where}.*; the last good checkpoint is .*{good}"):
        distil(world, *flags, build_task=build_broken)
    assert len(losses(tmp_path / "run")) == min(bad_step, 18)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_path": "/no/such/folder"}, "--data-path: got /no/such/folder"),
        ({"data_path": "EMPTY"}, "--data-path: got .*is empty"),
        ({"data_path": "NO_IMAGES"}, "--data-path: got .*has no images"),
        ({"teacher_checkpoint": "/no/such/file.pth"}, "--teacher-checkpoint: /no/such/file.pth: no such checkpoint"),
        ({"teacher_checkpoint": "TEXT"}, "not a checkpoint that can be read"),
        (
            {"teacher_model_kwargs": json.dumps({**TINY})},
            r"cls_token is \(1, 1, 96\) in the file, \(1, 1, 48\) in the model",
        ),
        ({"target_block": 4}, "--target-block: got 4, want 1 to 3"),
        ({"relation_heads": 5}, "--relation-heads: got 5, want a number that divides the student's width 48"),
        ({"train_batch_size": 16, "train_micro_batch_size_per_gpu": 5}, "--train-batch-size: got 16"),
        ({"train_batch_size": 97}, "--train-batch-size: got 97 images a step for 96 images"),
        ({"student_model": "resnet18"}, "--student-model: resnet18"),
        (
            {"tokens": "all", "student_model_kwargs": json.dumps({**TINY, "reg_tokens": 4})},
            "student has 21 tokens.*teacher 17",
        ),
        ({"deepspeed_config": "/no/ds.json"}, "--deepspeed-config: /no/ds.json can.t be read"),
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


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_pretraining_under_launchers_gives_a_teacher(world, image_folder, tmp_path, launcher):
    """Two ranks pre-train; the checkpoint resumes exactly; the teacher needs no description."""
    flags = pretrain_flags(image_folder, tmp_path / "teacher", bf16="false")
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
