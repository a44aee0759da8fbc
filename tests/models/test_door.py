"""What a weights file may make timm do: build a plain model of the sizes that it says, and nothing else."""

import inspect
import json
import socket

import pytest
import safetensors.torch
import timm
import torch

from tinymim_fast.errors import InputError
from tinymim_fast.evaluate import main as evaluate_main
from tinymim_fast.export import main as export_main
from tinymim_fast.models import vit
from tinymim_fast.models.architecture import KWARGS, check_kwargs, check_name
from tinymim_fast.models.checkpoints import load_encoder
from tinymim_fast.models.star import WiderHeads

NAME = "vit_tiny_patch16_224"
SMALL = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
GOOD = {
    "architecture": NAME,
    "model_kwargs": {**SMALL, "img_size": 32},
    "kind": "tinymim",
    "head_layout": {"embed_dim": 48, "num_heads": [3, 3]},
}
URL = "http://127.0.0.1:9/evil.safetensors"
# Each overwrites a part of what a good file says.
ATTACKS = {
    "pretrained": {"model_kwargs": {"pretrained": True}},
    "url": {"model_kwargs": {"pretrained": True, "pretrained_cfg": {"url": URL}, "cache_dir": "/tmp/site-packages"}},
    "file": {"model_kwargs": {"pretrained": True, "pretrained_cfg": {"file": "/etc/passwd"}}},
    "overlay": {"model_kwargs": {"pretrained_cfg_overlay": {"url": URL}}},
    "cache_dir": {"model_kwargs": {"cache_dir": "/tmp/site-packages"}},
    "checkpoint_path": {"model_kwargs": {"checkpoint_path": "/etc/passwd"}},
    "hub": {"architecture": "hf-hub:evil/model"},
    "hub, other spelling": {"architecture": "hf_hub:evil/model"},
    "local-dir": {"architecture": "local-dir:/tmp"},
    "path": {"architecture": "../../etc/passwd"},
    "list": {"architecture": [NAME]},
    "no such model": {"architecture": "vit_of_mine"},
    "block_fn": {"model_kwargs": {"block_fn": "os.system"}},
    "layer": {"model_kwargs": {"norm_layer": "os.system"}},
    "no such layer": {"model_kwargs": {"norm_layer": "of_mine"}},
    "kwargs list": {"model_kwargs": [1]},
    "huge": {"model_kwargs": {"embed_dim": 10**12}},
    "deep": {"model_kwargs": {"depth": 10**9}},
    "wide and deep": {"model_kwargs": {"embed_dim": 65536, "depth": 200, "num_heads": 1}},
    "fine patches": {"model_kwargs": {"img_size": 8192}},
    "negative": {"model_kwargs": {"depth": -1}},
    "no heads": {"model_kwargs": {"num_heads": 0}},
    "heads list": {"model_kwargs": {"num_heads": [3] * 5000}},
    "bool": {"model_kwargs": {"depth": True}},
    "fraction": {"model_kwargs": {"embed_dim": 48.5}},
    "text": {"model_kwargs": {"img_size": "32"}},
    "nan": {"model_kwargs": {"mlp_ratio": float("nan")}},
    "channels": {"model_kwargs": {"in_chans": 4}},
    "layout text": {"head_layout": {"embed_dim": 48, "num_heads": "33"}},
    "layout zero": {"head_layout": {"embed_dim": 48, "num_heads": [0, 3]}},
    "layout of others": {"head_layout": {"embed_dim": 48, "num_heads": [3, 6]}},
    "layout list": {"head_layout": [3, 3]},
    "recipe list": {"recipe": [1]},
    "recipe mean": {"recipe": {"mean": ["a", 0, 0], "std": [1, 1, 1]}},
    "recipe std": {"recipe": {"mean": [0, 0, 0], "std": [0, 1, 1]}},
    "recipe embedding": {"recipe": {"student_pos_embed": "os.system"}},
    "step": {"step": "7"},
    "kind": {"kind": None},
}


def described(attack):
    return {
        key: {**value, **attack[key]}
        if isinstance(value, dict) and isinstance(attack.get(key), dict)
        else attack.get(key, value)
        for key, value in {**GOOD, "recipe": {}, "step": 0}.items()
    }


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return vit.create_vit(NAME, img_size=32, **SMALL).state_dict()


@pytest.fixture
def no_network(monkeypatch):
    """Connections fail the test, and timm is watched: it may build with these arguments only."""

    def refuse(*args, **kwargs):
        pytest.fail("a weights file made this connect")

    create = timm.create_model

    def watched(name, **kwargs):
        assert not kwargs.pop("pretrained", False) and set(kwargs) <= set(KWARGS) and ":" not in name
        return create(name, pretrained=False, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(timm, "create_model", watched)


@pytest.mark.fault(
    "metadata of a weights file names a URL, a path, code or an absurd size",
    "refused, with what is wrong; nothing is fetched, opened or built",
)
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_metadata_of_a_file_reaches_timm_only_through_the_door(attack, state, tmp_path, no_network, capsys):
    """Teacher, export and evaluation."""
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(state, path, {"format": "pt", "tinymim_fast": json.dumps(described(attack))})
    with pytest.raises(InputError, match=r"m\.safetensors") as refusal:
        load_encoder(str(path))
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 1000
    assert export_main([str(path), str(tmp_path / "out")]) == 2
    assert evaluate_main([str(path), f"--data-path={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert said.count("m.safetensors") == 2 and "Traceback" not in said
    assert {p.name for p in tmp_path.iterdir()} == {"m.safetensors"}


@pytest.mark.parametrize(
    "config",
    [
        {"architecture": "hf-hub:evil/model"},
        {"architecture": NAME, "model_args": {"pretrained_cfg": {"url": URL}}},
        {"architecture": NAME, "model_args": {**SMALL, "checkpoint_path": "/etc/passwd"}},
        {"architecture": NAME, "model_args": "SMALL"},
        {"architecture": NAME, "model_args": {**SMALL, "img_size": [32, 64]}},
        {"architecture": NAME, "model_args": SMALL, "pretrained_cfg": {"input_size": [3, "x", "x"]}},
        {
            "architecture": NAME,
            "model_args": {**SMALL, "img_size": 32},
            "pretrained_cfg": {"mean": "x", "std": [1, 1, 1]},
        },
        {"architecture": NAME, "tinymim_fast": {**GOOD, "architecture": "local-dir:/tmp"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["{}", "timm:local-dir:{}"])
def test_so_does_a_timm_folders_config(config, form, state, tmp_path, no_network):
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"source: .*config.json"):
        load_encoder(form.format(tmp_path))


def test_a_timm_folder_is_read_without_timms_loader(state, tmp_path, no_network):
    """Its `pretrained_cfg` names other places; the weights beside it are taken."""
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    cfg = {
        "url": URL,
        "file": "/etc/passwd",
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "input_size": [3, 32, 32],
        "crop_pct": 1.0,
    }
    config = {"architecture": NAME, "model_args": SMALL, "num_classes": 0, "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, info = load_encoder(f"timm:local-dir:{tmp_path}")
    assert torch.equal(model.blocks[1].attn.qkv.weight, state["blocks.1.attn.qkv.weight"])
    assert info.kind == "timm" and info.model_kwargs["img_size"] == 32
    assert (info.expects.mean, info.expects.std, info.expects.crop_pct) == ((0.5,) * 3, (0.25,) * 3, 1.0)


def test_the_good_file_loads(state, tmp_path, no_network):
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(state, path, {"format": "pt", "tinymim_fast": json.dumps(described({}))})
    load_encoder(str(path))
    safetensors.torch.save_file(state, path, {"format": "pt", "tinymim_fast": json.dumps({**GOOD, "of_tomorrow": 1})})
    load_encoder(str(path))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "[" * 100_000, "{}"])
def test_a_description_that_is_none(text, state, tmp_path):
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(state, path, {"format": "pt", "tinymim_fast": text})
    with pytest.raises(InputError, match=r"source: .*m\.safetensors: its description"):
        load_encoder(str(path))


@pytest.mark.parametrize("flag", ["pretrained_cfg", "checkpoint_path", "cache_dir", "features_only"])
def test_flags_go_through_the_same_door(flag):
    with pytest.raises(InputError, match=f"model_kwargs: got '{flag}', want any of act_layer, "):
        vit.create_vit(NAME, img_size=32, **{flag: "x"})


def test_every_listed_argument_is_timms():
    """A name that timm drops or renames would silently be ignored by its **kwargs; one is of a model of ours."""
    timms, ours = (
        set(inspect.signature(kind.__init__).parameters) for kind in (timm.models.VisionTransformer, WiderHeads)
    )
    assert set(KWARGS) <= timms | ours and set(KWARGS) - timms == {"pre_head_dim"}


def test_the_door_gives_what_passes():
    assert check_name("vit_base_patch16_224.mae") == "vit_base_patch16_224.mae"
    assert check_kwargs({"img_size": [32, 32], "num_heads": [6, 12], "fc_norm": None}) == {
        "img_size": [32, 32],
        "num_heads": [6, 12],
        "fc_norm": None,
    }
