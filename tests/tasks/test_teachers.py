"""Teachers that want other images than their students: another mean and standard deviation."""

import copy
import json

import pytest
import safetensors
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

pytest.importorskip("deepspeed")

from support.programs import TEACHER, TINY, distill_flags
from support.runs import Stopped, distil, losses, stopping
from tinymim_fast import show
from tinymim_fast.config import IMAGENET_MEAN, IMAGENET_STD, parse
from tinymim_fast.export import export
from tinymim_fast.kernels import relation_loss
from tinymim_fast.models.checkpoints import WEIGHTS, find_weights, latest_checkpoint, load_encoder, read_weights
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


SMALL = {"depth": 2, "embed_dim": 96}
OTHER_PATCH = {**TINY, "patch_size": 4}
FOREIGN = {  # by timm's name: side of the image for 4 x 4 patches, tokens before the patches, mean
    "vit_small_patch14_reg4_dinov2": (56, 5, IMAGENET_MEAN),
    "vit_base_patch16_siglip_224": (64, 0, HALF),
    "vit_base_patch16_clip_224": (64, 1, (0.48145466, 0.4578275, 0.40821073)),
}


@pytest.fixture
def timm_weights(monkeypatch):
    """timm's models as if their weights had been fetched: random ones, the same each time."""
    create = timm.create_model

    def untrained(name, pretrained=False, **kwargs):
        torch.manual_seed(5)
        return create(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", untrained)


def foreign_flags(image_folder, folder, name, **changes):
    kwargs = {"teacher_model": None, "teacher_model_kwargs": json.dumps(SMALL), "img_size": FOREIGN[name][0]}
    return distill_flags(image_folder, f"timm:{name}", folder, **{**kwargs, "epochs": 1, "drop_path": 0, **changes})


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_teacher_is_compared_on_what_it_shares(name, world, image_folder, tmp_path, timm_weights, caplog):
    """The first loss is the formula's, from images that a loader makes for each: its own size and normalisation."""
    caplog.set_level("INFO")
    img_size, prefix, mean = FOREIGN[name]
    flags = foreign_flags(image_folder, tmp_path / "run", name, bf16="false", teacher_precision="fp32")
    seen = {}

    def noting(*args):
        task = build_task(*args)
        prepare = task.prepare
        object.__setattr__(task, "prepare", lambda views: prepare(seen.setdefault("views", views)))
        seen.setdefault("student", copy.deepcopy(task.model.student))
        return task

    with pytest.raises(Stopped):
        distil(world, *flags, build_task=stopping(noting, 2))
    teacher_view, student_view = seen["views"]
    assert teacher_view.shape[-1] == img_size and student_view.shape[-1] == 32  # its patches have 8 pixels
    assert "gets images of 32 pixels: as many patches as the teacher, 4 x 4" in caplog.text
    assert ("the patches alone are compared" in caplog.text) == (prefix != 1)

    teacher = create_vit(name, img_size=img_size, pretrained=True, **SMALL)
    mean_t, mean_s = (torch.tensor(m).view(3, 1, 1) for m in (mean, IMAGENET_MEAN))
    expects = timm.get_pretrained_cfg(name)
    assert tuple(expects.mean) == mean
    small = torch.nn.functional.interpolate(
        teacher_view * torch.tensor(expects.std).view(3, 1, 1) + mean_t, size=32, mode="bilinear", antialias=True
    )
    of_student = student_view * torch.tensor(IMAGENET_STD).view(3, 1, 1) + mean_s
    assert 0 < (small - of_student).abs().mean() < 0.15, "the same crop, jittered"

    cut = (0, 0) if prefix == 1 else (1, prefix)
    found = []
    teacher.blocks[-1].attn.qkv.register_forward_hook(lambda module, args, out: found.append(out))
    with torch.no_grad():
        (qkv_s,) = seen["student"](student_view).values()
        teacher.eval().forward_features(teacher_view)
    heads = teacher.blocks[-1].attn.num_heads
    tokens = qkv_s[:, cut[0] :].double(), found[0][:, cut[1] :].double()
    want = relation_loss(*tokens, relation_heads=heads, backend="reference")["loss"]
    assert losses(tmp_path / "run")[0] == pytest.approx(float(want), rel=1e-4)


def test_a_foreign_teachers_student_is_resumed_masked_exported_and_drawn(
    world, image_folder, tmp_path, timm_weights, capsys
):
    name = "vit_small_patch14_reg4_dinov2"
    flags = foreign_flags(image_folder, tmp_path / "run", name, mask_ratio=0.5, checkpoint_interval=3)
    with pytest.raises(Stopped):
        distil(world, *flags, build_task=stopping(build_task, 4))
    distil(world, *flags)
    distil(world, *foreign_flags(image_folder, tmp_path / "whole", name, mask_ratio=0.5, checkpoint_interval=3))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    export(str(tmp_path / "run"), tmp_path / "out")
    vit, info = load_encoder(str(tmp_path / "out"))
    assert vit.patch_embed.img_size == (32, 32) and info.model_kwargs["img_size"] == 32
    image = next(image_folder.rglob("*.jpg"))
    assert show.main([str(tmp_path / "run"), str(image), f"--output={tmp_path / 'x.png'}"]) == 0


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("vit_small_patch14_reg4_dinov2", {"tokens": "all"}, "--student-model-kwargs: the student has 17 tokens, 1 of"),
        (
            "vit_small_patch14_reg4_dinov2",
            {"student_model_kwargs": json.dumps({**TINY, "img_size": 64})},
            "--student-model-kwargs: the student has 64 patches, the teacher 16; match patch_size",
        ),
        ("vit_small_patch16_dinov3", {}, "--teacher-.*: vit_small_patch16_dinov3: is a Eva, want one of timm's"),
        (
            "vit_base_patch16_clip_224",
            {"students": json.dumps([{"name": "a", "model_kwargs": TINY}, {"name": "b", "model_kwargs": OTHER_PATCH}])},
            "--students: want images of one size, and these are in pixels: a 32, b 16; match patch_size",
        ),
    ],
    ids=["tokens", "size", "dinov3", "students"],
)  # fmt: skip
def test_foreign_teachers_that_dont_fit(name, changes, message, world, image_folder, tmp_path, timm_weights):
    img_size = FOREIGN.get(name, (64,))[0]
    flags = distill_flags(
        image_folder,
        f"timm:{name}",
        tmp_path / "run",
        **{"teacher_model": None, "teacher_model_kwargs": json.dumps(SMALL), "img_size": img_size, **changes},
    )
    with pytest.raises(ValueError, match=message):
        distil(world, *flags)
    assert not (tmp_path / "run").exists()
