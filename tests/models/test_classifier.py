"""Classifiers made of encoders: weights, heads, head layout, layer decay, loss; read back."""

import json

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.loss import SoftTargetCrossEntropy
from torch import nn

from support.programs import TEACHER, TINY
from tinymim_fast.errors import InputError
from tinymim_fast.models.checkpoints import load_encoder, save_weights
from tinymim_fast.models.classifier import (
    Classification,
    Classifier,
    create_classifier,
    freeze_parts,
    layer_scales,
    load_classifier,
    load_teacher,
)
from tinymim_fast.models.model_info import ModelInfo
from tinymim_fast.models.vit import create_vit, head_layout

NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """An encoder whose last block has other heads, with embeddings for 32 pixels."""
    torch.manual_seed(0)
    kwargs = {**TINY, "num_heads": [3, 3, 12], "img_size": 32}
    vit = create_vit(NAME, **kwargs)
    folder = tmp_path_factory.mktemp("uneven")
    save_weights(folder, vit.state_dict(), ModelInfo(NAME, kwargs, "tinymim", head_layout(vit)))
    return folder


def wanted(source, **changes):
    return Classifier(**{"source": str(source), "num_classes": 7, "img_size": 32, **changes})


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_encoder_weights_and_heads_travel_and_the_head_is_new(uneven, pool):
    vit, info = create_classifier(wanted(uneven, global_pool=pool))
    encoder, _ = load_encoder(str(uneven))
    state = vit.state_dict()
    same = [k for k, v in encoder.state_dict().items() if k in state and torch.equal(v, state[k])]
    assert len(same) == len(encoder.state_dict()) - (2 if pool == "avg" else 0)  # fc_norm in place of norm
    assert isinstance(vit.norm, nn.Identity) == (pool == "avg") == isinstance(vit.fc_norm, nn.LayerNorm)
    assert head_layout(vit)["num_heads"] == [3, 3, 12] == info.head_layout["num_heads"]
    assert 1.7e-5 < vit.head.weight.std() < 2.3e-5 and not vit.head.bias.any()
    assert vit.pos_embed.requires_grad and info.kind == "fine-tuned"


def test_the_number_of_heads_changes_by_a_flag_alone(uneven, caplog):
    vit, info = create_classifier(wanted(uneven, num_heads=6))
    assert head_layout(vit)["num_heads"] == [6, 6, 6] and info.model_kwargs["num_heads"] == 6
    assert "heads changed from [3, 3, 12] to [6, 6, 6]" in caplog.text
    with pytest.raises(InputError, match="num_heads: got 5 heads for block 1, want a number that divides its width 48"):
        create_classifier(wanted(uneven, num_heads=[5, 3, 3]))
    with pytest.raises(InputError, match="model_kwargs: block 1 has 6 heads in the model and 3 in"):
        create_classifier(wanted(uneven, model_kwargs={"num_heads": 6}))


def test_embeddings_are_resampled_to_another_size(uneven):
    vit, info = create_classifier(wanted(uneven, img_size=48))
    assert vit.pos_embed.shape[1] == 37 and info.model_kwargs["img_size"] == 48
    assert vit(torch.zeros(2, 3, 48, 48)).shape == (2, 7)


def test_drop_path_grows_with_depth(uneven):
    vit, _ = create_classifier(wanted(uneven, drop_path=0.2))
    rates = [block.drop_path1.drop_prob if isinstance(block.drop_path1, DropPath) else 0.0 for block in vit.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


def test_fresh_weights_are_those_that_a_student_starts_with():
    from tinymim_fast.models.vit import init_mae_style

    torch.manual_seed(5)
    vit, info = create_classifier(wanted("none", model=NAME, model_kwargs=TINY))
    torch.manual_seed(5)
    student = create_vit(NAME, img_size=32, num_classes=7, global_pool="avg", **TINY)
    init_mae_style(student, pos_embed="sincos")
    state = vit.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in student.state_dict().items() if not k.startswith("head."))
    assert vit.pos_embed.requires_grad and info.model_kwargs == {
        **TINY,
        "img_size": 32,
        "num_classes": 7,
        "global_pool": "avg",
    }
    with pytest.raises(InputError, match="model: got nothing, want the name of a model"):
        create_classifier(wanted("none"))


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_layer_decay_is_beits_formula(uneven, pool):
    """`decay ** (layers above)`, BEiT's and MAE's numbering written out; the norm before a class token is timm's."""
    vit, _ = create_classifier(wanted(uneven, global_pool=pool))
    scales = layer_scales(vit, 0.5)
    assert scales.keys() == dict(vit.named_parameters()).keys()
    for name, scale in scales.items():
        if name.startswith("blocks."):
            layer = 1 + int(name.split(".")[1])
        elif name.startswith(("cls_token", "pos_embed", "patch_embed")):
            layer = 0
        else:
            layer = 3 if name.startswith("norm.") else 4
        assert scale == 0.5 ** (4 - layer), name


def test_freezing(uneven):
    vit, _ = create_classifier(wanted(uneven, drop_path=0.2))
    freeze_parts(vit, num_blocks=2)
    trained = {name.split(".")[0] for name, p in vit.named_parameters() if p.requires_grad}
    assert trained == {"blocks", "fc_norm", "head"}
    assert all(p.requires_grad == name.startswith("2.") for name, p in vit.blocks.named_parameters())
    assert isinstance(vit.blocks[1].drop_path1, nn.Identity) and isinstance(vit.blocks[2].drop_path1, DropPath)
    freeze_parts(vit, all_but_head=True)
    assert [name for name, p in vit.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    with pytest.raises(InputError, match="num_blocks: got 4, want at most 3"):
        freeze_parts(vit, num_blocks=4)


def test_the_loss_is_the_criterion_of_the_logits(uneven):
    vit, _ = create_classifier(wanted(uneven, head_init_std=0.5))
    images, targets = torch.randn(4, 3, 32, 32), torch.softmax(torch.randn(4, 7), 1)
    (loss,) = Classification(vit.eval(), SoftTargetCrossEntropy())(images, targets).values()
    logits = vit.double()(images.double())
    want = -(targets.double() * (logits - logits.logsumexp(1, keepdim=True))).sum(1).mean()
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)


class TwoHeads(nn.Module):
    """Stands for a model with a distillation token."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, images):
        return self.logits


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_the_loss_with_a_teacher_is_deits(kind):
    """`(1 - a) CE(y, z) + a CE(argmax z_t, z_dist)`, or `a tau^2 KL(softmax(z_t / tau) || softmax(z_dist / tau))`."""
    z, z_dist, z_t = torch.randn(3, 4, 7, dtype=torch.float64)
    targets = torch.tensor([1, 0, 6, 3])
    model = Classification(TwoHeads((z, z_dist)), nn.CrossEntropyLoss(), alpha=0.3, kind=kind, tau=2.0)
    losses = model(None, targets, z_t)
    task = -torch.log_softmax(z, 1)[torch.arange(4), targets].mean()
    if kind == "hard":
        distill = -torch.log_softmax(z_dist, 1)[torch.arange(4), z_t.argmax(1)].mean()
    else:
        p, q = torch.softmax(z_t / 2, 1), torch.softmax(z_dist / 2, 1)
        distill = 4 * (p * (p.log() - q.log())).sum(1).mean()
    for name, want in (("loss", 0.7 * task + 0.3 * distill), ("task_loss", task), ("distill_loss", distill)):
        torch.testing.assert_close(losses[name].double(), want, rtol=1e-6, atol=1e-6)


def test_a_teacher_may_be_any_model_of_timms(tmp_path):
    """From a file of its weights, in its own normalisation."""
    torch.manual_seed(0)
    plain = timm.create_model("resnet10t", num_classes=3)
    torch.save(plain.state_dict(), tmp_path / "teacher.pth")
    teacher = load_teacher(str(tmp_path / "teacher.pth"), ["a", "b", "c"], model="resnet10t")
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(teacher(images), plain.eval()(images))
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    mean, std = (torch.full((1, 3, 1, 1), v) for v in (0.5, 0.25))
    seen = teacher.normalize_input(images, mean, std) * teacher.std_kd + teacher.mean_kd
    torch.testing.assert_close(seen, images * std + mean, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match=r"source: .*has 3 classes, and the images have 4, or others|not a resnet10t"):
        load_teacher(str(tmp_path / "teacher.pth"), ["a", "b", "c", "d"], model="resnet10t")


def save_classifier(folder, **changes):
    vit, info = create_classifier(wanted("none", model=NAME, model_kwargs=TINY))
    info = ModelInfo(
        info.architecture, info.model_kwargs, info.kind, info.head_layout, class_names=[f"class {i}" for i in range(7)]
    )
    save_weights(folder, vit.state_dict(), info)
    return vit


def test_a_classifier_is_read_back_with_its_class_names(tmp_path):
    vit = save_classifier(tmp_path)
    found, info = load_classifier(str(tmp_path))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(found.eval()(images), vit.eval()(images)) and info.class_names[6] == "class 6"


def test_what_is_no_classifier_is_refused(uneven, tmp_path):
    with pytest.raises(InputError, match=r"metric: .*has no classifier, so no accuracy of its own"):
        load_classifier(str(uneven))
    save_classifier(tmp_path)
    import safetensors.torch

    path = tmp_path / "model.safetensors"
    with safetensors.safe_open(path, framework="pt") as file:
        described = file.metadata()
    state = safetensors.torch.load_file(path)
    safetensors.torch.save_file({k: v for k, v in state.items() if k != "head.bias"}, path, described)
    with pytest.raises(InputError, match=r"it lacks head\.bias"):
        load_classifier(str(tmp_path))
    described["tinymim_fast"] = json.dumps({**json.loads(described["tinymim_fast"]), "class_names": ["one"]})
    safetensors.torch.save_file(state, path, described)
    with pytest.raises(InputError, match="its description has class_names that can't be"):
        load_classifier(str(tmp_path))


def test_an_official_fine_tuned_file_is_a_classifier(tmp_path):
    """MAE's layout of it: {"model": ...} with fc_norm and head."""
    torch.manual_seed(0)
    vit = timm.create_model(NAME, num_classes=11, global_pool="avg", **TEACHER, img_size=32)
    torch.save({"model": vit.state_dict()}, tmp_path / "finetuned.pth")
    found, info = load_classifier(str(tmp_path / "finetuned.pth"), model=NAME, model_kwargs=TEACHER)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(found.eval()(images), vit.eval()(images)) and info.class_names is None
