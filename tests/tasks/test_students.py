"""Runs with targets of any kind, masked input and several students, through the loop."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch

pytest.importorskip("deepspeed")

from support.programs import TINY, distill_flags
from support.runs import Stopped, distil, losses, stopping
from tinymim_fast.errors import InputError
from tinymim_fast.export import export
from tinymim_fast.models.checkpoints import latest_checkpoint, load_encoder, read_weights
from tinymim_fast.tasks import distill
from tinymim_fast.training.metrics import read_metrics

SMALL, OTHER = TINY, {**TINY, "embed_dim": 24, "depth": 2}
NAME = "vit_tiny_patch16_224"
PIXELS = {"kind": "pixels", "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
TARGETS = [
    {"kind": "relations", "relations": ["qq", "kv"], "heads": 3},
    {"kind": "features", "place": "mlp", "teacher_block": 2, "student_block": 1, "weight": 0.5},
    {"kind": "class_token"},
    PIXELS,
]
MASKED = {"mask_ratio": 0.6, "teacher_drop_path": 0.2, "drop_path": 0.3}


def flags_of(image_folder, teacher_file, folder, **changes):
    values = {k: json.dumps(v) if isinstance(v, (list, dict)) else v for k, v in changes.items()}
    return distill_flags(image_folder, teacher_file, folder, **{"epochs": 1, "warmup_epochs": 0, **values})


def state_of(run):
    """All tensors of the newest checkpoint."""
    folder = latest_checkpoint(run)
    return {
        f"{file}/{name}": tensor
        for file in ("model.safetensors", "optimizer.safetensors")
        for name, tensor in safetensors.torch.load_file(folder / file).items()
    }


def assert_same(run, other):
    ours, theirs = state_of(run), state_of(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.fixture(scope="module")
def every_target(world, image_folder, teacher_file, tmp_path_factory):
    """A run of every sort of target on masked input with drop path everywhere, its folder and what it changes."""
    folder = tmp_path_factory.mktemp("targets") / "run"
    changes = {"targets": TARGETS, **MASKED, "epochs": 6, "checkpoint_interval": 18}
    distil(world, *flags_of(image_folder, teacher_file, folder, **changes))
    return folder, changes


def test_each_target_is_reported_and_falls(every_target):
    folder, _ = every_target
    first = read_metrics(folder)[0]
    weights = {"relations": 1.0, "features": 0.5, "class_token": 1.0, "pixels": 1.0}
    assert first["loss"] == pytest.approx(sum(w * first[name] for name, w in weights.items()), rel=1e-5)
    assert first["relations"] == pytest.approx(first["relations/qq"] + first["relations/kv"], rel=1e-5)
    for name in weights:
        began, ended = np.mean(losses(folder, name)[:3]), np.mean(losses(folder, name)[-3:])
        assert ended < began, f"{name}: {began} to {ended}"
    assert (folder / "curves.png").stat().st_size > 1000


def test_a_stopped_run_goes_on_bitwise(every_target, world, image_folder, teacher_file, tmp_path):
    """Masks, teacher's drop path, linear layers and decoder too."""
    folder, changes = every_target
    flags = flags_of(image_folder, teacher_file, tmp_path / "run", **changes)
    with pytest.raises(Stopped):
        distil(world, *flags, build_task=stopping(distill.build_task, 20))
    distil(world, *flags)
    assert losses(tmp_path / "run") == losses(folder)
    assert_same(tmp_path / "run", folder)


def test_what_targets_train_is_saved_and_not_exported(every_target, tmp_path):
    folder, _ = every_target
    saved, _ = read_weights(folder)
    beside = {name for name in saved if name.startswith("targets.")}
    assert {name.split(".")[1] for name in beside} == {"features", "class_token", "pixels"}
    assert "targets.pixels.decoder.mask_token" in beside
    export(str(folder), tmp_path / "out")
    exported, _ = read_weights(tmp_path / "out")
    assert exported.keys() == saved.keys() - beside
    assert all(torch.equal(exported[name], saved[name]) for name in exported)
    assert load_encoder(str(folder))[0].embed_dim == 48


def test_masks_are_others_on_each_step_and_the_same_for_each_start(world, image_folder, teacher_file, tmp_path):
    seen = []

    def noting(*args):
        task = distill.build_task(*args)
        task.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[-1].clone()))
        return task

    flags = {"mask_ratio": 0.75, "epochs": 1}
    for run in "ab":
        distil(world, *flags_of(image_folder, teacher_file, tmp_path / run, **flags), build_task=noting)
    first, again = seen[:6], seen[6:]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({tuple(order.flatten().tolist()) for order in first}) == 6
    assert first[0].sort(1).values.equal(torch.arange(16).expand(16, -1))


TWO = [
    {"name": "small", "model": NAME, "model_kwargs": SMALL},
    {"name": "other", "model": NAME, "model_kwargs": OTHER, "drop_path": 0.5, "lr_scale": 3.0, "relation_heads": 6},
]
APART = [
    {"student_model_kwargs": SMALL},
    {"student_model_kwargs": OTHER, "drop_path": 0.5, "lr": 3e-3, "relation_heads": 6},
]


@pytest.mark.parametrize(
    ("changes", "targets"),
    [
        ({"zero_stage": 1, "bf16": "true"}, None),
        ({"zero_stage": 0, "bf16": "false", **MASKED}, TARGETS),
        pytest.param({"zero_stage": 3, "bf16": "false"}, TARGETS[:3], marks=pytest.mark.slow),
        pytest.param({"zero_stage": 2, "bf16": "true", **MASKED}, TARGETS, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_two_students_together_are_the_two_apart(changes, targets, world, image_folder, teacher_file, tmp_path):
    """Same views, seeds, masks and drop path; losses of each step and weights, with another rate, width and depth."""
    changes = {"drop_path": 0.2, **changes, "targets": targets}
    both = {"students": TWO, **changes}
    distil(world, *flags_of(image_folder, teacher_file, tmp_path / "both", **both))
    together, info = read_weights(tmp_path / "both")
    assert list(info.students) == ["small", "other"]
    total = np.zeros(6)
    for student, own in zip(TWO, APART, strict=True):
        name = student["name"]
        distil(world, *flags_of(image_folder, teacher_file, tmp_path / name, **{**changes, **own}))
        parts = [key for key in read_metrics(tmp_path / name)[0] if key not in ("step", "epoch", "lr", "time")]
        for part in parts[: parts.index("images_per_s")]:
            ours, alone = (losses(tmp_path / run, p) for run, p in (("both", f"{name}/{part}"), (name, part)))
            np.testing.assert_allclose(ours, alone, rtol=1e-6, err_msg=part)
        total += losses(tmp_path / name)
        apart, _ = read_weights(tmp_path / name)
        assert {f"student.{name}.{key}" for key in apart} <= together.keys()
        for key, tensor in apart.items():
            torch.testing.assert_close(together[f"student.{name}.{key}"], tensor, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(losses(tmp_path / "both"), total, rtol=1e-6)
    assert len(together) == sum(key.startswith(("student.small.", "student.other.")) for key in together)


@pytest.fixture(scope="module")
def two(world, image_folder, teacher_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "run"
    changes = {"students": TWO, **MASKED, "checkpoint_interval": 2, "checkpoint_hist": 9}
    distil(world, *flags_of(image_folder, teacher_file, folder, **changes))
    return folder, changes


def test_a_stopped_run_of_two_goes_on_bitwise(two, world, image_folder, teacher_file, tmp_path):
    folder, changes = two
    flags = flags_of(image_folder, teacher_file, tmp_path / "run", **changes)
    with pytest.raises(Stopped):
        distil(world, *flags, build_task=stopping(distill.build_task, 3))
    distil(world, *flags)
    assert_same(tmp_path / "run", folder)


def test_each_of_two_is_exported_evaluated_and_a_teacher_by_its_name(two, world, image_folder, tmp_path):
    folder, _ = two
    together, _ = read_weights(folder)
    for key, width, heads in (("small", 48, 3), ("student.other", 24, 6)):
        export(str(folder), tmp_path / key, key=key)
        vit, info = load_encoder(str(tmp_path / key))
        assert (vit.embed_dim, info.head_layout["relation_heads"], info.students) == (width, heads, {})
        name = f"student.{key.removeprefix('student.')}.blocks.0.attn.qkv.weight"
        assert torch.equal(vit.blocks[0].attn.qkv.weight, together[name])
    for key in (None, "third"):
        with pytest.raises(InputError, match=r"key: .*holds the students 'small', 'other'; say which"):
            load_encoder(str(folder), key=key)
    changes = {"teacher_model": None, "teacher_model_kwargs": None, "teacher_key": "other", "relation_heads": 6}
    distil(world, *flags_of(image_folder, folder, tmp_path / "next", **changes, epochs=1))
    with pytest.raises(InputError, match=r"--teacher-key: .* say which"):
        distil(world, *flags_of(image_folder, folder, tmp_path / "none", **{**changes, "teacher_key": None}))
    assert not (tmp_path / "none").exists()


BAD = [
    ({"targets": [{"kind": "relation"}]}, r"targets\[0\].kind: got relation, want one of relations, features"),
    ({"targets": [{"relations": ["qk"]}]}, r"targets\[0\].kind: got None, want one of"),
    ({"targets": []}, r"--targets: got \[\], want a list of mappings, each with its kind"),
    ({"targets": [{"kind": "local", "temprature": 1}]}, r"targets\[0\].temprature: .* did you mean temperature\?"),
    ({"targets": [{"kind": "local", "temperature": 0}]}, r"targets\[0\].temperature: got 0, want a number above 0"),
    ({"targets": [{"kind": "features", "place": "ffn"}]}, r"targets\[0\].place: got ffn, want one of block_output"),
    (
        {"targets": [{"kind": "features", "after_residual": True}]},
        r"targets\[0\].after_residual: got true with block_output, want it with mlp or attention",
    ),
    (
        {"targets": [{"kind": "relations", "teacher_block": [1, 2], "student_block": [1, 2, 3]}]},
        r"targets\[0\].student_block: got 3 blocks, want as many as of the teacher, 2",
    ),
    ({"targets": [{"kind": "features", "student_block": 4}]}, r"targets\[0\].student_block: got 4, want 1 to 3"),
    ({"targets": [{"kind": "relations", "heads": 5}]}, r"targets\[0\].heads: got 5, want a number that divides"),
    ({"targets": [{"kind": "relations", "weights": [1]}]}, r"targets\[0\].weights: got 1, want 2, one for each of qk"),
    ({"targets": [{"kind": "class_token", "name": "lr"}]}, r"targets\[0\].name: got lr, want a letter, "),
    (
        {"targets": [{"kind": "class_token"}, {"kind": "class_token"}]},
        r"targets\[1\].name: got class_token, which another target is called too; give each a name",
    ),
    ({"targets": [{"kind": "class_token"}], "relations": "[vv]"}, r"--relations: got \['vv'\] beside targets"),
    ({"targets": [PIXELS, {"kind": "local"}]}, r"targets\[0\].kind: got pixels without masked patches; set mask_ratio"),
    ({"targets": [PIXELS], "mask_ratio": 0.5}, r"--targets: got pixels alone, which need no teacher"),
    ({"targets": [{**PIXELS, "decoder_embed_dim": 20}]}, r"targets\[0\].decoder_embed_dim: got 20, want a multiple"),
    ({"targets": [{"kind": "logits"}]}, r"targets\[0\].kind: the teacher has no classifier; give a file that has one"),
    ({"mask_ratio": 0.95}, "--mask-ratio: got 0.95, which leaves none of 16 patches visible"),
    ({"mask_ratio": 1}, "--mask-ratio: got 1.0, want a share below 1"),
    ({"teacher_drop_path": 1}, "--teacher-drop-path: got 1.0, want a probability below 1"),
    ({"students": []}, "--students: got none, want a list of mappings"),
    ({"students": [{"name": "a"}, {"name": "a"}]}, r"students\[1\].name: got a, which another student is called too"),
    ({"students": [{"modle": NAME}]}, r"students\[0\].modle: .* did you mean model\?"),
    ({"students": [{"lr_scale": 0}]}, r"students\[0\].lr_scale: got 0, want a number above 0"),
    ({"students": [{"drop_path": 2}]}, r"students\[0\].drop_path: got 2, want a probability below 1"),
    ({"students": [{}, {"name": "b", "model": "vit_of_mine"}]}, r"students\[1\].model: got vit_of_mine, but timm"),
    (
        {"students": [{}, {"name": "b", "targets": [{"kind": "relations", "heads": 7}]}]},
        r"students\[1\].targets\[0\].heads: got 7, want a number that divides the student's width 48",
    ),
    (
        {"students": [{}, {"name": "b", "model_kwargs": {**TINY, "patch_size": 16, "img_size": 32}}]},
        r"students\[1\].model_kwargs: the student has 5 tokens, .* match patch_size",
    ),
    ({"students": [{"name": "keys"}]}, "--students: got keys, which PyTorch uses itself; want another name"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_targets_and_students_are_named_before_anything_is_written(
    changes, message, world, image_folder, teacher_file, tmp_path
):
    with pytest.raises(InputError, match=f"^{message}"):
        distil(world, *flags_of(image_folder, teacher_file, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
