"""A model's own mean, standard deviation, crop and size, through loading, evaluation and export."""

import json
import logging
from dataclasses import replace
from typing import get_args

import pytest
import timm
import torch
from timm.models import save_for_hf

from support.programs import distill_flags
from tinymim_fast.config import RunConfig, parse
from tinymim_fast.data.views import INTERPOLATIONS
from tinymim_fast.errors import InputError
from tinymim_fast.evaluate import eval_view
from tinymim_fast.export import export
from tinymim_fast.models.checkpoints import load_encoder
from tinymim_fast.models.preprocessing import Preprocessing
from tinymim_fast.tasks.distill import DistillConfig, load_teacher

SMALL = {"patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model as timm saves it: 32 pixels, mean and standard deviation 0.5, the whole image, bilinear."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, **SMALL)
    path = tmp_path_factory.mktemp("timm") / "hf"
    data = {
        "input_size": (3, 32, 32),
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
    }
    save_for_hf(model, str(path), model_args={**SMALL, "img_size": 32}, safe_serialization=True, data_config=data)
    return path


@pytest.mark.fault(
    "a model of another mean, standard deviation, size or crop", "kept by evaluation and export, said in training"
)
def test_evaluation_makes_images_as_the_model_expects(folder, caplog):
    _, info = load_encoder(str(folder))
    view = eval_view(info, str(folder))
    assert (view.img_size, view.resize_size, view.mean, view.std) == (32, 32, (0.5,) * 3, (0.5,) * 3)
    assert view.interpolation == "bilinear" and "were expected" not in caplog.text
    view = eval_view(replace(info, preprocessing={**info.preprocessing, "interpolation": "random"}), str(folder))
    assert view.interpolation == "bicubic" and "images resized by random were expected" in caplog.text


@pytest.mark.fault(
    "a model of another mean, standard deviation, size or crop", "kept by evaluation and export, said in training"
)
def test_export_keeps_it(folder, tmp_path):
    """From timm's folder, and again from the export."""
    source = folder
    for name in ("once", "twice"):
        export(str(source), tmp_path / name)
        source = tmp_path / name
        cfg = json.loads((source / "config.json").read_text())["pretrained_cfg"]
        assert cfg["mean"] == cfg["std"] == [0.5] * 3 and cfg["input_size"] == [3, 32, 32]
        assert cfg["crop_pct"] == 1.0 and cfg["interpolation"] == "bilinear"
        assert "license" not in cfg and "tag" not in cfg, "those of timm's weights, which these are not"
        data = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{source}", pretrained=True))
        assert tuple(data["mean"]) == (0.5,) * 3 and data["crop_pct"] == 1.0


def test_a_file_that_says_nothing_is_assumed_to_be_imagenets_and_that_is_said(teacher_file, caplog):
    kwargs = {"model": "vit_tiny_patch16_224", "model_kwargs": SMALL, "img_size": 32}
    _, info = load_encoder(str(teacher_file), **kwargs)
    view = eval_view(info, str(teacher_file))
    assert (view.mean, view.resize_size) == ((0.485, 0.456, 0.406), 37)
    assert "does not say how its images were made; assumed: " in caplog.text


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_teacher_of_another_interpolation_is_said(interpolation, folder, image_folder, tmp_path, caplog):
    changes = {"teacher_model": None, "teacher_model_kwargs": "{}", "interpolation": interpolation}
    load_teacher(parse(DistillConfig, distill_flags(image_folder, folder, tmp_path / "run", **changes), "p"))
    assert ("trained on images resized by bilinear, here by bicubic" in caplog.text) == (interpolation == "bicubic")


def test_a_run_takes_what_the_loaders_have():
    assert get_args(RunConfig.__annotations__["interpolation"]) == INTERPOLATIONS


@pytest.mark.fault(
    "a model of another mean, standard deviation, size or crop", "kept by evaluation and export, said in training"
)
@pytest.mark.parametrize(("mean", "said"), [("[0.485,0.456,0.406]", True), ("[0.5,0.5,0.5]", False)])
def test_a_teacher_of_another_normalisation_is_said(mean, said, folder, image_folder, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    changes = {"teacher_model": None, "teacher_model_kwargs": "{}", "mean": mean, "std": "[0.5,0.5,0.5]"}
    load_teacher(parse(DistillConfig, distill_flags(image_folder, folder, tmp_path / "run", **changes), "p"))
    message = "the teacher was trained on images of another mean 0.5 0.5 0.5, here 0.485 0.456 0.406"
    assert (message in caplog.text) == said and "std" not in caplog.text


def test_crops():
    assert [Preprocessing().resize_size(size) for size in (32, 64, 224, 384)] == [37, 73, 256, 439]
    assert Preprocessing(crop_pct=1.0).resize_size(224) == Preprocessing(crop_pct=1.3).resize_size(224) == 224


@pytest.mark.parametrize(
    "wrong",
    [
        *({"mean": value} for value in ("x", [1, 2], [0.1, float("nan"), 0.1], [True, 0.1, 0.1], 0.5)),
        *({"std": value} for value in ([0, 0.1, 0.1], [-1, 1, 1])),
        *({"crop_pct": value} for value in (0, -1, "1", [1], float("inf"))),
        *({"interpolation": value} for value in (3, "of_mine", ["bicubic"])),
    ],
    ids=str,
)
def test_values_that_cant_be(wrong):
    with pytest.raises(InputError, match=f"source: m: says {next(iter(wrong))} .*, which can't be"):
        Preprocessing.from_config({"mean": [0.5] * 3, "std": [0.5] * 3, **wrong}, "m")


def test_values_of_255_are_divided(caplog):
    said = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}
    assert not Preprocessing.from_config(said, "m").differences((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert "m: its mean and std are of 255: divided by 255" in caplog.text


def test_what_says_nothing_is_none():
    assert Preprocessing.from_config({"crop_pct": 0.9}, "m") is None and Preprocessing.from_config([], "m") is None
