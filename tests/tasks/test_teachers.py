"""Teachers that want other images than their students: another mean and standard deviation."""

import json

import pytest
import safetensors
import torch
import yaml
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

pytest.importorskip("deepspeed")

from support.programs import TEACHER, distill_flags
from support.runs import Stopped, distil, losses, stopping
from tinymim_fast.config import IMAGENET_MEAN, IMAGENET_STD, parse
from tinymim_fast.models.checkpoints import WEIGHTS, find_weights, latest_checkpoint, read_weights
from tinymim_fast.models.vit import create_vit
from tinymim_fast.tasks.distill import DistillConfig, build_task

HALF = (0.5, 0.5, 0.5)
IMAGENET = IMAGENET_MEAN, IMAGENET_STD


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory):
    """A teacher as timm saves it, trained on images of mean and standard deviation 0.5."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("timm") / "hf"
    vit = create_vit("vit_tiny_patch16_224", img_size=32, **TEACHER)
    data = {"input_size": (3, 32, 32), "mean": HALF, "std": HALF, "crop_pct": 1.0, "interpolation": "bicubic"}
    save_for_hf(vit, str(path), model_args={**TEACHER, "img_size": 32}, safe_serialization=True, data_config=data)
    return path


@pytest.fixture
def flags(image_folder, timm_folder, tmp_path):
    def flags(folder="run", **changes):
        changes = {"teacher_model": None, "teacher_model_kwargs": None, "epochs": 1, "drop_path": 0, **changes}
        return distill_flags(image_folder, timm_folder, tmp_path / folder, **changes)

    return flags


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({}, (HALF, HALF)),
        ({"teacher_mean": [0.1, 0.2, 0.3]}, ((0.1, 0.2, 0.3), HALF)),
        ({"teacher_std": [0.1, 0.2, 0.3], "mean": [0.4] * 3}, (HALF, (0.1, 0.2, 0.3))),
    ],
    ids=["its own", "another mean", "another std"],
)
def test_a_teachers_view_is_as_it_was_trained_unless_told(world, flags, changes, want):
    config = parse(DistillConfig, flags(**changes), "p")
    task = build_task(config, world, None)
    assert task.view.normalisations == (want, (config.mean, config.std))
    assert task.info.teacher_expects.mean == want[0] and task.info.teacher_expects.std == want[1]


def test_a_teacher_that_says_nothing_gets_the_students_mean_and_std(world, image_folder, teacher_file, tmp_path):
    config = parse(DistillConfig, distill_flags(image_folder, teacher_file, tmp_path / "run", mean=[0.4] * 3), "p")
    assert build_task(config, world, None).view.normalisations == (((0.4,) * 3, IMAGENET_STD),) * 2


def test_a_run_of_before_there_were_two_goes_on_as_it_began(world, flags, tmp_path):
    """Its teacher saw the student's mean and standard deviation, though its file says others."""
    old = flags(checkpoint_interval=2, verify_checkpoints="false")
    both = {"teacher_mean": list(IMAGENET_MEAN), "teacher_std": list(IMAGENET_STD)}
    with pytest.raises(Stopped):
        distil(
            world, *old, *(f"--{k.replace('_', '-')}={v}" for k, v in both.items()), build_task=stopping(build_task, 3)
        )
    as_before(tmp_path / "run")
    distil(world, *old)
    distil(world, *flags("whole", **both))
    distil(world, *flags("own"))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole") != losses(tmp_path / "own")
    for _, info in [read_weights(tmp_path / "run")]:
        assert (info.teacher_expects.mean, info.teacher_expects.std) == IMAGENET


def as_before(folder):
    """What the run has saved, without what there was not: the fields of config.yaml and of the weights' description."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    path = find_weights(latest_checkpoint(folder))
    with safetensors.safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()["tinymim_fast"])
    del described["teacher_preprocessing"]
    for recipe in (config, described["recipe"]):
        del recipe["teacher_mean"], recipe["teacher_std"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert path.name == WEIGHTS
    save_file(load_file(path), path, {"tinymim_fast": json.dumps(described)})


def test_a_bad_standard_deviation_is_named(flags):
    with pytest.raises(ValueError, match=r"--teacher-std: got .*, want three numbers above 0"):
        parse(DistillConfig, flags(teacher_std=[0, 0.1, 0.1]), "p")
