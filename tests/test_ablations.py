"""Each row of the paper's tables as a recipe: what differs from its base is the row, and it trains."""

import dataclasses
import json

import pytest
import torch

from tinymim_fast.config import RECIPES, parse
from tinymim_fast.errors import InputError
from tinymim_fast.models.vit import create_vit
from tinymim_fast.tasks.distill import DistillConfig, build_task

ABLATIONS = RECIPES / "ablations"
PATHS = ["--data-path=d", "--output-dir=o", "--teacher-checkpoint=t"]


def features(place, **more):
    return {"targets": ({"kind": "features", "place": place, **more},)}


def relations(*names, **more):
    return {"targets": ({"kind": "relations", "relations": list(names), **more},)}


RECONSTRUCTION = {"kind": "pixels"}
BASE, SMALL, TINY = "ablations/base", "tinymim_small", "tinymim_tiny"
# By recipe: its base, and the fields that differ.
ROWS = {
    "base": ("tinymim_base", {"epochs": 100}),
    "features_block_output": (BASE, features("block_output")),
    "features_mlp_before_residual": (BASE, features("mlp")),
    "features_mlp_after_residual": (BASE, features("mlp", after_residual=True)),
    "features_attention_before_residual": (BASE, features("attention")),
    "features_attention_after_residual": (BASE, features("attention", after_residual=True)),
    "features_qkv": (BASE, features("qkv")),
    "class_token": (BASE, {"targets": ({"kind": "class_token"},)}),
    "class_token_reconstruction": (BASE, {"mask_ratio": 0.75, "targets": ({"kind": "class_token"}, RECONSTRUCTION)}),
    "relations_qq_kk_vv_no_softmax": (BASE, relations("qq", "kk", "vv", softmax=False)),
    "relations_qq_kk_vv": (BASE, {"relations": ("qq", "kk", "vv")}),
    "relations_qk_vv_no_softmax": (BASE, relations("qk", "vv", softmax=False)),
    "relations_qk_vv": (BASE, {}),
    "target_block_12": (BASE, {"target_block": 12}),
    "target_block_15": (BASE, {"target_block": 15}),
    "target_block_18": (BASE, {}),
    "target_block_21": (BASE, {"target_block": 21}),
    "target_block_24": (BASE, {"target_block": 24}),
    "input_raw": (BASE, {}),
    "input_masked": (BASE, {"mask_ratio": 0.75}),
    "input_masked_reconstruction": (BASE, {"mask_ratio": 0.75, "targets": ({"kind": "relations"}, RECONSTRUCTION)}),
    "drop_path_teacher_0_student_0": (BASE, {"drop_path": 0.0}),
    "drop_path_teacher_0_student_01": (BASE, {}),
    "drop_path_teacher_0_student_02": (BASE, {"drop_path": 0.2}),
    "drop_path_teacher_0_student_03": (BASE, {"drop_path": 0.3}),
    "drop_path_teacher_01_student_01": (BASE, {"teacher_drop_path": 0.1}),
    "small_from_mae_base": (SMALL, {"epochs": 100}),
    "small_from_mae_large": (
        SMALL,
        {
            "epochs": 100,
            "teacher_model": "vit_large_patch16_224",
            "target_block": 18,
            "relation_heads": 16,
            "student_model_kwargs": {"num_heads": [6] * 11 + [16]},
        },
    ),
    "small_from_tinymim_base": (SMALL, {"epochs": 100}),
    "tiny_from_mae_small": (TINY, {"epochs": 100}),
    "tiny_from_mae_base": (TINY, {"epochs": 100, "teacher_model": "vit_base_patch16_224"}),
    "tiny_from_tinymim_small": (TINY, {"epochs": 100}),
}


def test_every_recipe_is_a_row():
    assert {path.stem for path in ABLATIONS.glob("*.yaml")} == ROWS.keys()


@pytest.mark.parametrize("name", ROWS)
def test_a_row_differs_from_its_base_by_the_row(name):
    base, row = ROWS[name]
    ours, theirs = (parse(DistillConfig, [f"--config={r}", *PATHS], "p") for r in (f"ablations/{name}", base))
    fields = [f.name for f in dataclasses.fields(ours)]
    assert {f: getattr(ours, f) for f in fields if getattr(ours, f) != getattr(theirs, f)} == row
    lines = [line for line in (ABLATIONS / f"{name}.yaml").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) <= 6 and lines[0].startswith("config: ")


TEACHER = {"patch_size": 8, "embed_dim": 96, "depth": 24, "num_heads": 6}
STUDENT = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


@pytest.fixture(scope="module")
def deep_teacher(tmp_path_factory):
    """Of 24 blocks, as the paper's."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("deep") / "teacher.pth"
    torch.save({"model": create_vit("vit_tiny_patch16_224", img_size=32, **TEACHER).state_dict()}, path)
    return path


@pytest.mark.parametrize("name", ROWS)
def test_a_row_trains(name, world, deep_teacher):
    """Two steps of its task at 32 pixels: the loss is finite, every weight moves, the loss falls on the same views."""
    flags = {
        "teacher_checkpoint": deep_teacher,
        "teacher_model_kwargs": json.dumps(TEACHER),
        "student_model_kwargs": json.dumps(STUDENT),
        "img_size": 32,
        "drop_path": 0,
        "bf16": "false",
        "teacher_precision": "fp32",
    }
    recipe = [f"--config=ablations/{name}", *(f"--{k}={v}" for k, v in flags.items())]
    config = parse(DistillConfig, [*recipe, "--data-path=d", "--output-dir=o"], "p")
    task = build_task(config, world, None)
    trained = {n: p for n, p in task.model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in trained.items()}
    adamw = torch.optim.AdamW(trained.values(), lr=1e-4, weight_decay=0)
    views = torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).unbind()
    losses = []
    for _ in range(3):
        torch.manual_seed(1)
        task.streams.restore({})  # the same masks and drop path again
        with torch.no_grad():
            inputs = task.prepare(views)
        found = task.model(*inputs)
        assert tuple(found) == task.parts
        losses.append(float(found["loss"].detach()))
        adamw.zero_grad()
        found["loss"].backward()
        adamw.step()
    assert losses[2] < losses[1] < losses[0] < float("inf")
    assert [n for n, p in trained.items() if torch.equal(p, before[n])] == []


def recipe(folder, name, text):
    (folder / name).write_text(text)
    return f"--config={folder / name}"


def test_what_comes_later_wins(tmp_path, monkeypatch):
    """A recipe over the one beside it, seen from its own folder; several on the command line; flags over all."""
    (tmp_path / "below").mkdir()
    recipe(tmp_path, "base.yaml", "epochs: 50\nwarmup_epochs: 5\nlr: 0.1\n")
    middle = recipe(tmp_path / "below", "middle.yaml", "config: ../base.yaml\nlr: 0.2\nseed: 1\n")
    top = recipe(tmp_path / "below", "top.yaml", "config: middle.yaml\nseed: 2\n")
    other = recipe(tmp_path, "other.yaml", "seed: 3\n")
    monkeypatch.chdir(tmp_path)

    def found(*flags):
        config = parse(DistillConfig, [*flags, *PATHS], "p")
        return config.epochs, config.lr, config.seed

    assert found(middle) == (50, 0.2, 1) and found(top) == (50, 0.2, 2)
    assert found(top, other) == (50, 0.2, 3) and found(other, top) == (50, 0.2, 2)
    assert found(top, "--seed=4", "--lr=1") == (50, 1.0, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config: absent.yaml\n", "config is absent.yaml, want a YAML file, .* --config tinymim_base --config"),
        ("config: [base.yaml]\n", r"config is \['base.yaml'\], want a YAML file"),
        ("seed: 1\nconfig: base.yaml\n", "config stands behind other keys, which it would override; make it the first"),
        ("config: top.yaml\n", "config is top.yaml, which leads back to this file"),
        ("config: round.yaml\n", "round.yaml: config is top.yaml, which leads back to this file"),
        ("config: bad.yaml\n", "bad.yaml has the key epohcs, which no run knows; did you mean epochs"),
    ],
)
def test_bad_bases_are_named(tmp_path, text, message):
    recipe(tmp_path, "base.yaml", "epochs: 50\n")
    recipe(tmp_path, "round.yaml", "config: top.yaml\n")
    recipe(tmp_path, "bad.yaml", "epohcs: 50\n")
    with pytest.raises(InputError, match=f"^--config: .*{message}"):
        parse(DistillConfig, [recipe(tmp_path, "top.yaml", text), *PATHS], "p")
