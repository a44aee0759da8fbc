"""Files in the layout of the published ones, made here: their numbers of heads, classifiers, and what is refused."""

import argparse
import logging

import pytest
import timm
import torch
import torch.nn.functional as F

from tinymim_fast.config import RECIPES
from tinymim_fast.errors import InputError
from tinymim_fast.evaluate import main as evaluate_main
from tinymim_fast.export import export
from tinymim_fast.models.checkpoints import load_encoder
from tinymim_fast.models.official import published
from tinymim_fast.models.taps import Place, Taps
from tinymim_fast.models.vit import head_layout

TINY = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def state():
    """A ViT-T with weights that make heads matter."""
    torch.manual_seed(0)
    model = timm.create_model(TINY, num_classes=0)
    for name, parameter in model.named_parameters():
        if "qkv" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.state_dict()


def save(path, state, model="tinymim_vit_tiny_patch16", **more):
    torch.save({"model": state, "args": argparse.Namespace(model=model, blr=1.5e-4), "epoch": 299, **more}, path)
    return str(path)


def by_formula(state, images, heads):
    """A pre-norm transformer written out, fp64, each block with its heads; gives the last block's norm1 and qkv."""
    w = {name: tensor.double() for name, tensor in state.items()}
    x = F.conv2d(images.double(), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=16)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], dim=1) + w["pos_embed"]

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    for i, num_heads in enumerate(heads):
        block = f"blocks.{i}"
        h = norm(x, f"{block}.norm1")
        qkv = linear(h, f"{block}.attn.qkv")
        if i == len(heads) - 1:
            return h, qkv
        q, k, v = (z.unflatten(-1, (num_heads, -1)).transpose(1, 2) for z in qkv.chunk(3, dim=-1))
        attention = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v
        x = x + linear(attention.transpose(1, 2).flatten(2), f"{block}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")


def test_a_pretraining_file_has_the_papers_heads(state, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    vit, info = load_encoder(save(tmp_path / "t.pth", state))
    heads = [6] * 11 + [12]
    assert head_layout(vit)["num_heads"] == info.head_layout["num_heads"] == heads
    assert (info.kind, info.architecture, info.head_layout["relation_heads"]) == ("tinymim", TINY, 12)
    assert "a tinymim model with 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 12 heads" in caplog.text
    images = torch.randn(1, 3, 224, 224)
    places = [Place("norm1", 12), Place("qkv", 12)]
    found = Taps(vit.double().eval(), places)(images.double())
    for place, want in zip(places, by_formula(state, images, heads), strict=True):
        torch.testing.assert_close(found[place], want, rtol=1e-9, atol=1e-9)
    (of_timm, _) = by_formula(state, images, [3] * 12)
    off = (of_timm - found[places[0]]).norm() / of_timm.norm()
    assert off > 0.1, "timm's 3 heads must give something else, or this shows nothing"


@pytest.mark.parametrize(
    ("name", "architecture", "kind", "heads", "relation_heads"),
    [
        ("tinymim_vit_tiny_patch16", "vit_tiny_patch16_224", "tinymim", [6] * 11 + [12], 12),
        ("tinymim_vit_small_patch16", "vit_small_patch16_224", "tinymim", [6] * 11 + [12], 12),
        ("tinymim_vit_base_patch16", "vit_base_patch16_224", "tinymim", [12] * 11 + [16], 16),
        ("mae_vit_large_patch16", "vit_large_patch16_224", "mae", None, None),
        ("mae_vit_huge_patch14_dec512d8b", "vit_huge_patch14_224", "mae", None, None),
        ("vit_base_patch16", "vit_base_patch16_224", "fine-tuned", None, None),
    ],
)
def test_what_published_names_mean(name, architecture, kind, heads, relation_heads):
    told = published({"model": name}, {})
    assert (told.architecture, told.kind, told.relation_heads) == (architecture, kind, relation_heads)
    assert told.model_kwargs.get("num_heads") == heads


@pytest.mark.parametrize(
    "args", [{}, {"model": 3}, {"model": "vit_giant"}, {"model": "hf-hub:x/tinymim_vit_tiny_patch16"}]
)
def test_other_arguments_tell_nothing(args):
    assert published(args, {}) is None


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_recipes_build_the_published_students(size):
    import yaml

    recipe = yaml.safe_load((RECIPES / f"tinymim_{size}.yaml").read_text())
    told = published({"model": f"tinymim_vit_{size}_patch16"}, {})
    assert recipe["student_model_kwargs"] == told.model_kwargs
    assert recipe["student_model"] == told.architecture
    assert recipe["relation_heads"] == told.relation_heads


def fine_tuned(state, num_classes=10):
    """As the official fine-tuning writes it: norm behind the pooling, a classifier."""
    generator = torch.Generator().manual_seed(1)
    rest = {name: tensor for name, tensor in state.items() if not name.startswith("norm.")}
    return rest | {
        "fc_norm.weight": torch.randn(192, generator=generator),
        "fc_norm.bias": torch.randn(192, generator=generator),
        "head.weight": torch.randn(num_classes, 192, generator=generator),
        "head.bias": torch.randn(num_classes, generator=generator),
    }


@pytest.mark.parametrize("name", ["vit_tiny_patch16", "tinymim_vit_tiny_patch16"])
def test_a_fine_tuned_file_keeps_its_classifier_and_pools_as_trained(state, tmp_path, name):
    tuned = fine_tuned(state)
    path = save(tmp_path / "ft.pth", tuned, name)
    vit, info = load_encoder(path)
    plain = timm.create_model(TINY, num_classes=10, global_pool="avg").eval()
    plain.load_state_dict(tuned, strict=True)
    images = torch.randn(2, 3, 224, 224)
    assert info.kind == "fine-tuned" and info.head_layout["num_heads"] == [3] * 12
    assert torch.equal(vit.eval()(images), plain(images))
    export(path, tmp_path / "out")
    exported = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert torch.equal(exported(images), plain(images))
    assert torch.equal(load_encoder(str(tmp_path / "out"))[0].eval()(images), plain(images))


def test_both_norms_fit_no_model(state, tmp_path):
    with pytest.raises(InputError, match="has norm and fc_norm"):
        load_encoder(save(tmp_path / "ft.pth", state | fine_tuned(state), "vit_tiny_patch16"))


def test_a_class_token_classifier_is_kept(state, tmp_path):
    head = {"head.weight": torch.randn(7, 192), "head.bias": torch.randn(7)}
    vit, info = load_encoder(save(tmp_path / "ft.pth", state | head, "vit_tiny_patch16"))
    assert (
        vit.num_classes == 7
        and torch.equal(vit.head.weight, head["head.weight"])
        and info.model_kwargs["num_classes"] == 7
    )


def test_the_star_model_is_named_in_its_refusal(state, tmp_path):
    star = state | {
        "dist_token": torch.zeros(1, 1, 192),
        "conv1x1.0.weight": torch.zeros(192),
        "conv1x1.1.weight": torch.zeros(1280, 192),
        "head.weight": torch.zeros(1000, 1280),
    }
    with pytest.raises(
        InputError, match=r"source: .*TinyMIM\*-T \(a distillation token, a wider layer before the head\)"
    ):
        load_encoder(save(tmp_path / "star.pth", star))


def test_a_file_that_says_nothing_is_foreign_and_the_log_says_what_was_assumed(state, tmp_path, caplog):
    path = tmp_path / "m.pth"
    torch.save({"model": state}, path)
    _, info = load_encoder(str(path))
    assert info.kind == "foreign" and info.head_layout["num_heads"] == [3] * 12
    assert "says nothing of its attention heads; assumed: 3 a block, as in timm's vit_tiny_patch16_224" in caplog.text
    vit, info = load_encoder(str(path), model_kwargs={"num_heads": [6] * 11 + [12]})
    assert head_layout(vit)["num_heads"] == [6] * 11 + [12]
    assert "assumed: 6, 12 a block, as model_kwargs says" in caplog.text


@pytest.mark.fault(
    "a checkpoint is loaded with other numbers of heads", "refused with the block and both numbers", tries=4
)
def test_other_heads_than_the_files_are_refused(state, tmp_path, capsys, image_folder):
    path = save(tmp_path / "t.pth", state)
    message = r"model_kwargs: block 1 has 3 heads in the model and 6 in .*t\.pth"
    with pytest.raises(InputError, match=message):
        load_encoder(path, model_kwargs={"num_heads": 3})
    with pytest.raises(InputError, match="block 12 has 6 heads in the model and 12 in"):
        load_encoder(path, model_kwargs={"num_heads": 6})
    export(path, tmp_path / "out")
    with pytest.raises(InputError, match="block 1 has 3 heads in the model and 6 in"):
        load_encoder(str(tmp_path / "out"), model_kwargs={"num_heads": [3] * 12})
    arguments = [path, f"--data-path={image_folder}", "--model-kwargs", '{"num_heads": 3}']
    assert evaluate_main(arguments) == 2
    assert "evaluate: --model-kwargs: block 1 has 3 heads in the model and 6 in" in capsys.readouterr().err


def test_the_name_of_another_size_is_refused(state, tmp_path):
    path = save(tmp_path / "t.pth", state, "tinymim_vit_small_patch16")
    with pytest.raises(InputError, match=r"not a vit_small_patch16_224: cls_token is \(1, 1, 192\) in the file"):
        load_encoder(path)
    with pytest.raises(InputError, match=r"model: got vit_tiny_patch16_224, but .* holds a vit_small_patch16_224"):
        load_encoder(path, model=TINY)


def test_a_deit_with_a_distillation_token_is_timms(tmp_path):
    torch.manual_seed(0)
    deit = timm.create_model("deit_tiny_distilled_patch16_224").eval()
    torch.save({"model": deit.state_dict()}, tmp_path / "deit.pth")
    vit, info = load_encoder(str(tmp_path / "deit.pth"))
    assert info.architecture == "deit_tiny_distilled_patch16_224" and vit.num_prefix_tokens == 2
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(vit.eval()(images), deit(images))
