"""What a distillation's checkpoints say and hold of the student: heads of each block, BatchNorm's statistics."""

import json

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

pytest.importorskip("deepspeed")

from support.programs import TINY, distill_flags
from support.runs import Stopped, distil, losses, stopping
from tinymim_fast.config import parse
from tinymim_fast.errors import InputError
from tinymim_fast.export import export
from tinymim_fast.models.checkpoints import find_weights, latest_checkpoint, load_encoder, read_weights
from tinymim_fast.models.taps import Place, Taps
from tinymim_fast.models.vit import create_vit, head_layout, init_mae_style
from tinymim_fast.targets.relations import RelationLoss
from tinymim_fast.tasks import distill
from tinymim_fast.tasks.build_students import PREFIX

UNEVEN = {**TINY, "num_heads": [3, 6, 12]}


def uneven_flags(image_folder, teacher_file, output_dir, **changes):
    kwargs = json.dumps(UNEVEN)
    return distill_flags(
        image_folder,
        teacher_file,
        output_dir,
        student_model_kwargs=kwargs,
        relation_heads=12,
        epochs=1,
        drop_path=0,
        **changes,
    )


@pytest.fixture(scope="module")
def uneven(world, image_folder, teacher_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uneven") / "run"
    distil(world, *uneven_flags(image_folder, teacher_file, folder, checkpoint_interval=2, checkpoint_hist=9))
    return folder


def test_a_student_with_other_heads_in_other_blocks_keeps_them(uneven, tmp_path):
    _, info = read_weights(uneven)
    assert info.head_layout["num_heads"] == [3, 6, 12] == info.model_kwargs["num_heads"]
    export(str(uneven), tmp_path / "out")
    for source in (uneven, tmp_path / "out"):
        vit, found = load_encoder(str(source))
        assert head_layout(vit)["num_heads"] == [3, 6, 12] and found.head_layout["relation_heads"] == 12


def test_the_heads_of_the_blocks_before_change_the_loss(uneven, world, image_folder, teacher_file, tmp_path):
    """The same weights, images and relations with 3 heads everywhere: another first loss."""
    flags = uneven_flags(image_folder, teacher_file, tmp_path / "run")
    flags = [flag for flag in flags if not flag.startswith("--student-model-kwargs")]
    with pytest.raises(Stopped):
        distil(world, *flags, f"--student-model-kwargs={json.dumps(TINY)}", build_task=stopping(distill.build_task, 2))
    assert losses(tmp_path / "run")[0] != losses(uneven)[0]


def test_a_stopped_run_of_uneven_heads_continues_bitwise(uneven, world, image_folder, teacher_file, tmp_path):
    flags = uneven_flags(image_folder, teacher_file, tmp_path / "run", checkpoint_interval=2, checkpoint_hist=9)
    with pytest.raises(Stopped):
        distil(world, *flags, build_task=stopping(distill.build_task, 3))
    distil(world, *flags)
    assert losses(tmp_path / "run") == losses(uneven)


@pytest.mark.fault("a checkpoint is loaded with other numbers of heads", "refused with the block and both numbers")
def test_a_checkpoint_of_other_heads_is_not_continued(uneven, world, image_folder, teacher_file, tmp_path):
    """One whose file says other numbers than the configuration beside it builds."""
    flags = uneven_flags(image_folder, teacher_file, tmp_path / "run", checkpoint_interval=2, checkpoint_hist=9)
    flags.append("--verify-checkpoints=false")  # a file that somebody changed on purpose
    with pytest.raises(Stopped):
        distil(world, *flags, build_task=stopping(distill.build_task, 3))
    path = find_weights(latest_checkpoint(tmp_path / "run"))
    with safetensors.safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()["tinymim_fast"])
    described["head_layout"]["num_heads"] = [3, 3, 12]
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, {"tinymim_fast": json.dumps(described)})
    with pytest.raises(
        InputError, match=r"--student-model-kwargs: block 2 has 6 heads in the model and 3 in "
    ) as refusal:
        distil(world, *flags)
    assert "step_00000002" in str(refusal.value)


@pytest.mark.fault("a checkpoint is loaded with other numbers of heads", "refused with the block and both numbers")
def test_a_teachers_other_heads_are_refused_by_flag(uneven, image_folder, world, tmp_path):
    changes = {"teacher_model": None, "teacher_model_kwargs": '{"num_heads": 4}', "relation_heads": 12}
    flags = distill_flags(image_folder, uneven, tmp_path / "run", **changes)
    message = r"--teacher-model-kwargs: block 1 has 4 heads in the model and 3 in .*; .* leave num_heads out"
    with pytest.raises(InputError, match=message):
        distil(world, *flags)
    assert not (tmp_path / "run").exists()


def test_the_loss_is_the_formula_of_uneven_models(uneven, teacher_file, image_folder, tmp_path):
    """Student and teacher in fp64 through `relation_kl`'s formula, heads as consecutive groups of channels."""
    config = parse(distill.DistillConfig, uneven_flags(image_folder, teacher_file, tmp_path / "run"), "p")
    teacher, heads = Taps(distill.load_teacher(config)[0], [Place("qkv", 3)]), 12
    torch.manual_seed(0)
    student = create_vit("vit_tiny_patch16_224", img_size=32, **UNEVEN)
    init_mae_style(student, pos_embed="sincos")
    taps = Taps(student.double().eval(), [Place("qkv", 3)])
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        (qkv_s,), (qkv_t,) = taps(images).values(), teacher.double().eval()(images).values()
    want = 0.0
    for x, y in ((0, 1), (2, 2)):
        log_s, log_t = (
            torch.log_softmax((h[x] @ h[y].mT) * h[x].shape[-1] ** -0.5, -1)
            for h in (
                [z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in qkv.chunk(3, -1)] for qkv in (qkv_s, qkv_t)
            )
        )
        want = want + (log_t.exp() * (log_t - log_s)).sum(-1).mean()
    got = RelationLoss(heads, relations=("qk", "vv"), backend="reference")(qkv_s, qkv_t)["loss"]
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)


HYBRID = {
    "student_model": "vit_small_resnet26d_224",
    "student_model_kwargs": json.dumps({"embed_dim": 24, "depth": 2, "num_heads": 3}),
    "teacher_model_kwargs": json.dumps({"patch_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3}),
    "img_size": 64,
    "epochs": 1,
}


@pytest.fixture(scope="module")
def coarse_teacher(tmp_path_factory):
    """A teacher with the hybrid's four patches."""
    torch.manual_seed(0)
    kwargs = json.loads(HYBRID["teacher_model_kwargs"])
    path = tmp_path_factory.mktemp("coarse") / "teacher.pth"
    torch.save({"model": create_vit("vit_tiny_patch16_224", img_size=64, **kwargs).state_dict()}, path)
    return path


class Statistics:
    """A `build_task` that works out a BatchNorm's running statistics beside it, in fp64, from what it is given."""

    def __init__(self):
        self.mean = self.var = None

    def __call__(self, *args):
        task = distill.build_task(*args)
        name, norm = next((n, m) for n, m in task.model.named_modules() if isinstance(m, nn.BatchNorm2d))
        self.name, self.momentum = name.removeprefix(PREFIX), norm.momentum
        self.mean, self.var = norm.running_mean.double(), norm.running_var.double()
        norm.register_forward_pre_hook(lambda module, inputs: self.see(module, inputs[0]))
        return task

    def see(self, module, x):
        if module.training:
            var, mean = torch.var_mean(x.detach().double(), dim=(0, 2, 3))
            self.mean = (1 - self.momentum) * self.mean + self.momentum * mean
            self.var = (1 - self.momentum) * self.var + self.momentum * var


@pytest.mark.fault(
    "a student with BatchNorm", "its statistics are trained, saved, resumed and exported, under bf16 weights too"
)
@pytest.mark.parametrize(
    ("stage", "bf16"),
    [pytest.param(1, "false", marks=pytest.mark.slow), pytest.param(0, "true", marks=pytest.mark.slow), (2, "true")],
)
def test_batch_norms_statistics_are_trained_saved_resumed_and_exported(
    stage, bf16, world, image_folder, coarse_teacher, tmp_path
):
    """Against the running mean in fp64, under bf16 weights too."""
    flags = distill_flags(image_folder, coarse_teacher, tmp_path / "run", zero_stage=stage, bf16=bf16, **HYBRID)
    flags = [*flags, "--checkpoint-interval=3", "--checkpoint-hist=1"]
    seen = Statistics()
    with pytest.raises(Stopped):
        distil(world, *flags, build_task=stopping(seen, 3))
    half = read_weights(tmp_path / "run")[0]
    rtol = 1e-4
    for kind, want in (("mean", seen.mean), ("var", seen.var)):
        saved = half[f"{seen.name}.running_{kind}"]
        assert saved.dtype == torch.float32
        torch.testing.assert_close(saved.double(), want, rtol=rtol, atol=rtol * float(want.abs().max()))
    assert int(half[f"{seen.name}.num_batches_tracked"]) == 3
    distil(world, *flags)
    whole = read_weights(tmp_path / "run")[0]
    assert int(whole[f"{seen.name}.num_batches_tracked"]) == 6
    assert not torch.equal(whole[f"{seen.name}.running_mean"], half[f"{seen.name}.running_mean"])
    export(str(tmp_path / "run"), tmp_path / "out")
    exported = read_weights(tmp_path / "out")[0]
    assert all(
        torch.equal(exported[name], whole[name]) for name in whole if "running_" in name or "num_batches" in name
    )
