import argparse
import json

import pytest
import safetensors.torch
import timm
import torch

from tinymim_fast.errors import InputError
from tinymim_fast.models.checkpoints import (
    latest_checkpoint,
    list_checkpoints,
    load_encoder,
    read_weights,
    save_weights,
)
from tinymim_fast.models.model_info import ModelInfo
from tinymim_fast.models.taps import Place, Taps
from tinymim_fast.models.vit import head_layout, sincos_2d

SMALL = {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
NAME = "vit_tiny_patch16_224"


def official_mae_state(width=48, depth=3, patch=8, grid=4, decoder=32):
    """Names and shapes of the published MAE files, written out."""
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, grid * grid + 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "mask_token": (1, 1, decoder),
        "decoder_pos_embed": (1, grid * grid + 1, decoder),
        "decoder_embed.weight": (decoder, width),
        "decoder_embed.bias": (decoder,),
        "decoder_norm.weight": (decoder,),
        "decoder_norm.bias": (decoder,),
        "decoder_pred.weight": (3 * patch * patch, decoder),
        "decoder_pred.bias": (3 * patch * patch,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for prefix, c, n in (("blocks", width, depth), ("decoder_blocks", decoder, 2)):
        for i in range(n):
            for name, shape in {
                "norm1.weight": (c,),
                "norm1.bias": (c,),
                "attn.qkv.weight": (3 * c, c),
                "attn.qkv.bias": (3 * c,),
                "attn.proj.weight": (c, c),
                "attn.proj.bias": (c,),
                "norm2.weight": (c,),
                "norm2.bias": (c,),
                "mlp.fc1.weight": (4 * c, c),
                "mlp.fc1.bias": (4 * c,),
                "mlp.fc2.weight": (c, 4 * c),
                "mlp.fc2.bias": (c,),
            }.items():
                shapes[f"{prefix}.{i}.{name}"] = shape
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def load(path, **kwargs):
    return load_encoder(str(path), **{"model": NAME, "model_kwargs": SMALL, "img_size": 32, **kwargs})


@pytest.mark.parametrize("form", ["model", "state_dict", "bare", "module.", "with args", "safetensors"])
def test_official_mae_layout_loads(tmp_path, form):
    state = official_mae_state()
    path = tmp_path / ("m.safetensors" if form == "safetensors" else "m.pth")
    if form == "safetensors":
        safetensors.torch.save_file(state, path)
    elif form == "module.":
        torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, path)
    elif form == "with args":  # TinyMIM's own files also carry the program's arguments, optimizer and epoch
        torch.save({"model": state, "args": argparse.Namespace(lr=1e-3), "epoch": 299, "optimizer": {}}, path)
    else:
        torch.save(state if form == "bare" else {form: state}, path)
    vit, _ = load(path)
    got = vit.state_dict()
    for name in (
        "cls_token",
        "pos_embed",
        "blocks.2.attn.qkv.weight",
        "blocks.0.norm1.bias",
        "patch_embed.proj.weight",
    ):
        assert torch.equal(got[name], state[name]), name


def test_a_file_without_final_norm_loads(tmp_path):
    state = {k: v for k, v in official_mae_state().items() if not k.startswith(("norm.", "decoder", "mask"))}
    torch.save({"model": state}, tmp_path / "m.pth")
    load(tmp_path / "m.pth")


def test_architecture_is_read_off_the_widths(tmp_path):
    vit = timm.create_model(NAME, num_classes=0)
    torch.save({"model": vit.state_dict()}, tmp_path / "m.pth")
    _, info = load_encoder(str(tmp_path / "m.pth"))
    assert info.architecture == NAME and info.head_layout["num_heads"] == [3] * 12


def test_widths_that_no_model_has_ask_for_the_name(tmp_path):
    torch.save({"model": official_mae_state()}, tmp_path / "m.pth")
    with pytest.raises(InputError, match=r"model: .* holds 3 blocks of width 48, patch 8"):
        load_encoder(str(tmp_path / "m.pth"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_kwargs": {**SMALL, "embed_dim": 96}},
            r"cls_token is \(1, 1, 48\) in the file, \(1, 1, 96\) in the model",
        ),
        ({"model_kwargs": {**SMALL, "depth": 4}}, r"it lacks blocks\.3\.norm1\.weight, \(48,\)"),
        ({"model_kwargs": {**SMALL, "depth": 2}}, r"it has blocks\.2\.norm1\.weight, \(48,\), and the model has none"),
        ({"model_kwargs": {**SMALL, "patch_size": 16}}, r"patch_embed\.proj\.weight is \(48, 3, 8, 8\) in the file"),
        ({"model_kwargs": {**SMALL, "mlp_ratio": 2}}, r"mlp\.fc1\.weight is \(192, 48\) in the file, \(96, 48\)"),
        ({"model_kwargs": {**SMALL, "class_token": False}}, r"pos_embed is \(1, 17, 48\) in the file, \(1, 16, 48\)"),
    ],
    ids=["width", "deeper", "shallower", "patch", "mlp", "no class token"],
)
def test_another_architecture_names_the_first_key_and_both_shapes(tmp_path, change, message):
    torch.save({"model": official_mae_state()}, tmp_path / "m.pth")
    with pytest.raises(InputError, match=message):
        load(tmp_path / "m.pth", **change)


def test_what_is_no_checkpoint_is_named(tmp_path):
    text, empty, cut = tmp_path / "t.pth", tmp_path / "e.pth", tmp_path / "c.pth"
    text.write_text("not a checkpoint")
    empty.write_bytes(b"")
    torch.save({"model": official_mae_state()}, cut)
    cut.write_bytes(cut.read_bytes()[:-5000])
    other, numbers = tmp_path / "s.safetensors", tmp_path / "n.pth"
    other.write_bytes(b"x" * 100)
    torch.save({"epoch": 3}, numbers)
    for path in (text, empty, cut, other, numbers, tmp_path / "missing.pth", tmp_path):
        with pytest.raises(InputError, match=f"source: {path}"):
            load(path)


@pytest.mark.fault("a weights file that would run code or open other files", "refused, nothing is executed")
def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"model": Evil()}, tmp_path / "m.pth")
    with pytest.raises(InputError, match=r"holds a Python object, 'io.open', beside its tensors") as refusal:
        load(tmp_path / "m.pth")
    assert "torch.save({'model': model.state_dict()}, FILE)" in str(refusal.value)
    assert "weights_only" not in str(refusal.value)
    assert not (tmp_path / "ran").exists()


def test_position_embeddings_are_resampled_to_the_image_size(tmp_path):
    state = official_mae_state()
    state["pos_embed"] = sincos_2d((4, 4), 48, 1)
    torch.save({"model": state}, tmp_path / "m.pth")
    vit, info = load(tmp_path / "m.pth", img_size=64)
    assert vit.pos_embed.shape == (1, 65, 48) and info.model_kwargs["img_size"] == 64
    assert torch.equal(vit.pos_embed[:, 0], state["pos_embed"][:, 0])
    corner = vit.pos_embed[0, 1:].unflatten(0, (8, 8))[:2, :2].mean((0, 1))
    torch.testing.assert_close(corner, state["pos_embed"][0, 1], atol=0.15, rtol=0)


def test_own_checkpoint_says_what_it_is(tmp_path):
    torch.manual_seed(0)
    vit = timm.create_model(NAME, num_classes=0, img_size=32, reg_tokens=2, **SMALL)
    kwargs = {**SMALL, "img_size": 32, "reg_tokens": 2}
    info = ModelInfo(NAME, kwargs, "tinymim", {**head_layout(vit), "relation_heads": 6}, {"epochs": 3}, 7, 0.5)
    folder = tmp_path / "run" / "checkpoints" / "step_00000007"
    folder.mkdir(parents=True)
    save_weights(folder, vit.state_dict(), info)
    for source in (tmp_path / "run", folder, folder / "model.safetensors"):
        again, found = load_encoder(str(source))
        assert found == info
        assert all(
            torch.equal(a, b) for a, b in zip(again.state_dict().values(), vit.state_dict().values(), strict=True)
        )
    with pytest.raises(InputError, match="model: got vit_base_patch16_224"):
        load_encoder(str(folder), model="vit_base_patch16_224")


def test_timm_names(tmp_path):
    with pytest.raises(InputError, match="timm has no model of this name"):
        load_encoder("timm:no_such_model")
    with pytest.raises(InputError, match=r"model: got .*; leave it out"):
        load_encoder(f"timm:{NAME}", model="vit_base_patch16_224")


def test_timm_weights_from_a_local_folder(tmp_path):
    """`timm:local-dir:DIR` is the offline form of `timm:NAME`."""
    torch.manual_seed(0)
    vit = timm.create_model(NAME, num_classes=0, img_size=32, **SMALL)
    safetensors.torch.save_file(vit.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": NAME, "num_classes": 0, "model_args": {**SMALL, "img_size": 32}, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    again, _ = load_encoder(f"timm:local-dir:{tmp_path}", img_size=32)
    images = torch.randn(1, 3, 32, 32)
    theirs, ours = (Taps(model, [Place("output", 2)])(images)[Place("output", 2)] for model in (vit, again))
    torch.testing.assert_close(ours, theirs)


def test_metadata_is_in_the_file(tmp_path):
    vit = timm.create_model(NAME, num_classes=0, img_size=32, **SMALL)
    save_weights(tmp_path, vit.state_dict(), ModelInfo(NAME, {}, "mae", head_layout(vit)))
    state, info = read_weights(tmp_path)
    assert info.head_layout == {"embed_dim": 48, "num_heads": [3, 3, 3]} and set(state) == set(vit.state_dict())


def test_only_folders_named_by_a_step_that_hold_weights_are_checkpoints(tmp_path):
    names = ("step_00000020", "step_00000020_backup", "step_backup", "step_20", "tmp_step_00000030", "step_00000040")
    for name in names:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "model.safetensors").write_bytes(b"")
    (tmp_path / "checkpoints" / "step_00000050").mkdir()
    (tmp_path / "checkpoints" / "step_00000060").write_text("a file")
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000020", "step_00000040"]
    assert latest_checkpoint(tmp_path).name == "step_00000040"
    assert latest_checkpoint(tmp_path / "none") is None
