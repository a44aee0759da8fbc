"""Fine-tuning runs: what they learn, validate, save, continue, refuse."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch

pytest.importorskip("deepspeed")

from support.programs import TINY, run_forked, start_forked, start_ranks
from support.runs import Stopped, fine_tune, finetune_flags, last_step, losses, stopping
from tinymim_fast.config import parse
from tinymim_fast.errors import EXIT_INPUT, EXIT_TERMINATED, InputError
from tinymim_fast.export import export
from tinymim_fast.models.checkpoints import EMA_WEIGHTS, WEIGHTS, latest_checkpoint, read_weights
from tinymim_fast.models.classifier import load_classifier
from tinymim_fast.tasks import finetune
from tinymim_fast.training.metrics import read_metrics

NUM_VAL = 32


def same_weights(one, other):
    for name in (WEIGHTS, EMA_WEIGHTS):
        ours, theirs = (read_weights(latest_checkpoint(run) / name)[0] for run in (one, other))
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert torch.equal(ours[key], theirs[key]), (name, key)


# Two epochs of six steps, with everything that draws or averages.
FULL = {"epochs": 2, "model_ema": "true", "model_ema_decay": 0.8, "checkpoint_interval": 4, "bf16": "true"}


@pytest.fixture(scope="module")
def whole(world, image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune") / "run"
    fine_tune(world, *finetune_flags(image_folder, folder, **FULL, checkpoint_hist=9))
    return folder


def test_every_epoch_is_validated_and_the_best_is_named(whole):
    records = read_metrics(whole)
    assert [r["step"] for r in records] == list(range(1, 13))
    validated = [r for r in records if "top1" in r]
    assert [r["epoch"] for r in validated] == [1.0, 2.0]
    for record in validated:
        for suffix in ("", "_ema"):
            counts = [record[f"top{k}{suffix}"] * NUM_VAL / 100 for k in (1, 5)]
            assert counts == [round(c) for c in counts] and 0 <= counts[0] <= counts[1] <= NUM_VAL
            assert 2 < record[f"val_loss{suffix}"] < 4
    best = json.loads((whole / "best.json").read_text())
    assert best["top1_ema"] == max(r["top1_ema"] for r in validated)
    assert (whole / best["checkpoint"] / WEIGHTS).is_file()


def test_what_is_validated_is_what_is_saved(whole, image_folder):
    """The last record's numbers, from the files: of the weights and of their average."""
    from tinymim_fast.data import find_images
    from tinymim_fast.data.views import EvalView
    from tinymim_fast.evaluation.ranks import Share
    from tinymim_fast.evaluation.top_accuracies import top_accuracies

    record, images = read_metrics(whole)[-1], find_images(image_folder, split="val", workers=1)
    view, share = EvalView(img_size=32, resize_size=37), Share(torch.device("cpu"), 16, 1, loader="torchvision")
    for source, suffix in ((whole, "_ema"), (latest_checkpoint(whole) / WEIGHTS, "")):
        vit, info = load_classifier(str(source))
        assert info.class_names == list(images.class_names) and info.expects.resize_size(32) == 37
        with torch.autocast("cpu", torch.bfloat16):
            found = top_accuracies(vit.eval(), images, view, share)
        assert found["num_images"] == NUM_VAL
        for name, value in (("top1", "top1"), ("top5", "top5"), ("loss", "val_loss")):
            assert found[name] == record[value + suffix]


def test_the_average_is_timms_of_the_saved_weights(world, image_folder, tmp_path):
    """Against timm's ModelEmaV3, fed with the fp32 weights of a checkpoint after each step."""
    from timm.utils import ModelEmaV3

    flags = finetune_flags(image_folder, tmp_path / "run", **{**FULL, "epochs": 1, "checkpoint_interval": 1})
    fine_tune(world, *flags, "--checkpoint-hist=9", "--zero-stage=2")
    average = None
    for step in range(1, 7):
        folder = tmp_path / "run" / "checkpoints" / f"step_{step:08d}"
        vit, _ = load_classifier(str(folder / WEIGHTS))
        if average is None:
            average = ModelEmaV3(vit, decay=0.8)
        average.update(vit, step)
        saved, _ = read_weights(folder / EMA_WEIGHTS)
        for name, tensor in average.module.state_dict().items():
            torch.testing.assert_close(saved[name], tensor, rtol=1e-6, atol=1e-8, msg=f"{name}, step {step}")
    assert not torch.equal(saved["head.weight"], vit.state_dict()["head.weight"])


@pytest.mark.parametrize("changes", [{}, {"zero_stage": 0, "bf16": "false"}, {"zero_stage": 3}], ids=["1", "0", "3"])
def test_a_stopped_run_continues_bitwise(whole, world, image_folder, tmp_path, changes):
    reference, flags = whole, finetune_flags(image_folder, tmp_path / "cut", **{**FULL, **changes})
    if changes:
        reference = tmp_path / "whole"
        fine_tune(world, *finetune_flags(image_folder, reference, **{**FULL, **changes}))
    with pytest.raises(Stopped):
        fine_tune(world, *flags, build_task=stopping(finetune.build_task, 5))
    assert last_step(tmp_path / "cut") == 4
    fine_tune(world, *flags)
    assert losses(tmp_path / "cut") == losses(reference)
    kept = [
        [{k: v for k, v in r.items() if "top" in k or "val" in k} for r in read_metrics(run)]
        for run in (tmp_path / "cut", reference)
    ]
    assert kept[0] == kept[1]
    same_weights(tmp_path / "cut", reference)


def test_sigterm_saves_and_the_same_command_goes_on(whole, image_folder, tmp_path):
    flags = finetune_flags(image_folder, tmp_path / "run", **{**FULL, "epochs": 40, "checkpoint_interval": 0})
    run = start_forked("finetune", *flags)
    try:
        run.wait_for("step 8/")
        os.kill(run.pid, signal.SIGTERM)
        output, _ = run.communicate(180)
    finally:
        run.kill()
    assert run.returncode == EXIT_TERMINATED, output
    stopped_at = last_step(tmp_path / "run")
    assert 8 <= stopped_at < 240 and f"stopped by SIGTERM at step {stopped_at}, saved" in output
    run = start_forked("finetune", *flags)
    try:
        run.wait_for(f"step {stopped_at + 1}/240")
    finally:
        run.kill()


class Interrupted:
    """A `build_task` whose run gets a request to stop while it validates for the first time."""

    def __init__(self, stop):
        self.stop, self.calls = stop, 0

    def __call__(self, *args):
        task = finetune.build_task(*args)
        measure = task.validation.measure

        def interrupted(weights, stopping):
            self.calls += 1
            if self.calls == 1:
                self.stop.reason = "SIGTERM"
            return measure(weights, stopping)

        object.__setattr__(task.validation, "measure", interrupted)
        return task


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_validation_that_a_signal_breaks_off_is_made_up_for(world, image_folder, tmp_path, epochs):
    from tinymim_fast.config import name_flags
    from tinymim_fast.errors import Terminated
    from tinymim_fast.training import loop
    from tinymim_fast.training.stop import StopRequests

    config = parse(finetune.FinetuneConfig, finetune_flags(image_folder, tmp_path / "run", epochs=epochs), "p")
    stop = StopRequests()
    with name_flags(finetune.FinetuneConfig), pytest.raises(Terminated, match="stopped by SIGTERM at step 6"):
        loop.train(config, world, Interrupted(stop), stop)
    assert not any("top1" in r for r in read_metrics(tmp_path / "run"))
    loop.train(config, world, finetune.build_task)
    assert [r["epoch"] for r in read_metrics(tmp_path / "run") if "top1" in r] == [float(e + 1) for e in range(epochs)]


def test_two_ranks_are_one_with_twice_the_batch(world, image_folder, tmp_path):
    """Without Mixup and erasing, which are each rank's own: the same losses, the same counts."""
    plain = {"mixup": 0, "cutmix": 0, "reprob": 0, "drop_path": 0, "bf16": "false", "model_ema": "true"}
    fine_tune(world, *finetune_flags(image_folder, tmp_path / "one", **plain))
    ranks = start_ranks("finetune", *finetune_flags(image_folder, tmp_path / "two", **plain, zero_stage=2))
    try:
        outputs = [rank.communicate(120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4)
    one, two = (read_metrics(tmp_path / run)[-1] for run in ("one", "two"))
    for name in ("top1", "top5", "top1_ema", "top5_ema"):
        assert one[name] == two[name]
    for name in (WEIGHTS, EMA_WEIGHTS):
        ours, theirs = (read_weights(latest_checkpoint(tmp_path / run) / name)[0] for run in ("one", "two"))
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_a_class_is_learnt_from_its_labels(world, image_folder, tmp_path, loader):
    """A probe of one bright and one dark class: wrong labels could not be learnt."""
    pytest.importorskip("nvidia.dali" if loader == "dali" else "torchvision")
    from PIL import Image

    generator = np.random.default_rng(0)
    for split, number in (("train", 32), ("val", 8)):
        for name, grey in (("bright", 180), ("dark", 70)):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                noise = generator.normal(grey, 20, (40, 40, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(noise).save(folder / f"{i}.png")
    quiet = {"aa": None, "reprob": 0, "mixup": 0, "cutmix": 0, "layer_decay": 1, "drop_path": 0, "lr": 3e-3}
    flags = finetune_flags(tmp_path / "images", tmp_path / "run", **quiet, epochs=4, loader=loader)
    fine_tune(world, *flags)
    assert read_metrics(tmp_path / "run")[-1]["top1"] == 100


@pytest.mark.parametrize(
    ("changes", "trained"),
    [({"linear_probe": "true"}, {"head"}), ({"freeze_blocks": 2}, {"blocks.2", "fc_norm", "head"})],
    ids=["probe", "freeze"],
)
def test_frozen_parts_keep_their_exact_values(whole, world, image_folder, tmp_path, changes, trained):
    flags = finetune_flags(image_folder, tmp_path / "run", checkpoint=whole, model=None, model_kwargs=None, **changes)
    fine_tune(world, *flags)
    before, after = (read_weights(run)[0] for run in (whole, tmp_path / "run"))
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert {".".join(name.split(".")[: 2 if "blocks" in name else 1]) for name in changed} == trained


def test_the_export_is_timms_with_class_names(whole, tmp_path):
    import timm

    assert export(str(whole), tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    vit, info = load_classifier(str(whole))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), vit.eval()(images))
    assert model.pretrained_cfg["label_names"] == info.class_names and model.num_classes == 16
    assert model.pretrained_cfg["crop_pct"] == 0.875 and model.pretrained_cfg["input_size"] == (3, 32, 32)
    raw, _ = load_classifier(str(latest_checkpoint(whole) / WEIGHTS))
    assert not torch.equal(raw.head.weight, vit.head.weight)


BAD = {
    "odd": ({"train_batch_size": 15}, "--train-micro-batch-size-per-gpu: got 15 images at once, and mixup"),
    "classes": ({"num_classes": 10}, "--num-classes: got 10, and .* holds 16 classes"),
    "checkpoint": ({"checkpoint": "nothing"}, "--checkpoint: nothing: no such checkpoint"),
    "scratch": ({"model": None}, "--model: got nothing, want the name of a model"),
    "heads": ({"num_heads": 5}, "--num-heads: got 5 heads for block 1, want a number that divides its width 48"),
    "blocks": ({"freeze_blocks": 4}, "--freeze-blocks: got 4, want at most 3"),
    "aa": ({"aa": "v0"}, "--aa: got v0, want timm's rand-"),
    "token": ({"model_kwargs": json.dumps({**TINY, "class_token": False}), "global_pool": "token"}, "--global-pool: "),
    "split": ({"val_split": "test"}, "--data-path: .* holds train, val; want test"),
    "layer_decay": ({"layer_decay": 0}, "--layer-decay: got 0.0, want more than 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_written(world, image_folder, tmp_path, case):
    changes, message = BAD[case]
    with pytest.raises(InputError, match=message):
        fine_tune(world, *finetune_flags(image_folder, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_folders_that_cant_be_classified_are_refused(world, image_folder, tmp_path):
    one = tmp_path / "one"
    for split in ("train", "val"):
        shutil.copytree(image_folder / split / "star", one / split / "star")
    with pytest.raises(InputError, match=r"--data-path: .* one class, star; want two or more"):
        fine_tune(world, *finetune_flags(one, tmp_path / "run", train_batch_size=2))
    shutil.copytree(image_folder, tmp_path / "other")
    (tmp_path / "other" / "val" / "star").rename(tmp_path / "other" / "val" / "comet")
    with pytest.raises(InputError, match=r"--data-path: .* 1 classes without training images, comet"):
        fine_tune(world, *finetune_flags(tmp_path / "other", tmp_path / "run"))
    shutil.rmtree(tmp_path / "other" / "val")
    code, output = run_forked("finetune", *finetune_flags(tmp_path / "other", tmp_path / "run"))
    assert code == EXIT_INPUT and "finetune.py: --data-path: " in output and "want val" in output
    assert not (tmp_path / "run").exists()


DISTILLED = {"epochs": 2, "checkpoint_interval": 4, "zero_stage": 2}


@pytest.fixture(scope="module")
def distilled(whole, world, image_folder, tmp_path_factory):
    """A run with a distillation token, that learns from the classifier `whole`."""
    folder = tmp_path_factory.mktemp("distilled") / "run"
    flags = finetune_flags(image_folder, folder, **DISTILLED, teacher_checkpoint=whole)
    fine_tune(world, *flags)
    return folder


def test_a_distillation_token_learns_from_a_teacher(distilled, tmp_path):
    import timm

    for record in read_metrics(distilled):
        assert record["loss"] == pytest.approx((record["task_loss"] + record["distill_loss"]) / 2, rel=1e-3)
    vit, info = load_classifier(str(distilled))
    assert info.architecture == "deit_tiny_distilled_patch16_224" and vit.num_prefix_tokens == 2
    export(str(distilled), tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), vit.eval()(images))


def test_a_run_with_a_teacher_continues_bitwise(distilled, whole, world, image_folder, tmp_path):
    flags = finetune_flags(image_folder, tmp_path / "cut", **DISTILLED, teacher_checkpoint=whole)
    with pytest.raises(Stopped):
        fine_tune(world, *flags, build_task=stopping(finetune.build_task, 5))
    other = latest_checkpoint(whole) / WEIGHTS  # not the average
    with pytest.raises(InputError, match=r"--teacher-checkpoint: is step_00000012 .* began with step_00000012"):
        fine_tune(world, *flags, f"--teacher-checkpoint={other}")
    fine_tune(world, *flags)
    assert losses(tmp_path / "cut") == losses(distilled)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_checkpoint": "nothing"}, "--teacher-checkpoint: nothing: no such checkpoint"),
        ({"teacher_checkpoint": "timm:nothing"}, "--teacher-checkpoint: got nothing, but timm has no model"),
        ({"teacher_model": "resnet18"}, "--teacher-model: got resnet18, want teacher_checkpoint too"),
        (
            {"model": "vit_large_patch16_224"},
            "--teacher-checkpoint: .* timm has no model deit_large_distilled_patch16_224",
        ),
    ],
)
def test_a_teacher_that_cant_be_used_is_refused(whole, world, image_folder, tmp_path, changes, message):
    changes = {**({} if "teacher_model" in changes else {"teacher_checkpoint": whole}), **changes}
    with pytest.raises(InputError, match=message):
        fine_tune(world, *finetune_flags(image_folder, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_other_classes_is_refused(whole, world, image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "images")
    for split in ("train", "val"):
        (tmp_path / "images" / split / "star").rename(tmp_path / "images" / split / "comet")
    with pytest.raises(InputError, match=r"--teacher-checkpoint: .* has 16 classes, and the images have 16, or others"):
        fine_tune(world, *finetune_flags(tmp_path / "images", tmp_path / "run", teacher_checkpoint=whole))


def test_the_classifier_of_tinymim_star(whole, world, image_folder, tmp_path):
    """A layer before both heads, 12 heads: its logits by the formula; saved, exported, read back."""
    import timm

    heads = {"model_kwargs": json.dumps({**TINY, "num_heads": 12}), "pre_head_dim": 160}
    fine_tune(world, *finetune_flags(image_folder, tmp_path / "run", teacher_checkpoint=whole, **heads))
    vit, info = load_classifier(str(tmp_path / "run"))
    assert info.architecture == "tinymim_fast_star" and info.head_layout["num_heads"] == [12] * 3
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = vit.eval().forward_features(images)
        norm, linear, _ = vit.pre_head
        of_token = torch.nn.functional.gelu(linear(norm(tokens[:, :2])))
        want = (vit.head(of_token[:, 0]) + vit.head_dist(of_token[:, 1])) / 2
    torch.testing.assert_close(vit(images), want)
    assert not export(str(tmp_path / "run"), tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert torch.equal(model(images), vit(images)) and linear.weight.shape == (160, 48)
