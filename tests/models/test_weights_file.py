"""Files of weights as others write them, damage them, or aim them at whoever loads them."""

import argparse
import collections
import io
import json
import logging
import pathlib
import pickle
import random
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from tinymim_fast.errors import InputError
from tinymim_fast.evaluate import main as evaluate_main
from tinymim_fast.models.checkpoints import load_encoder

NAME = "vit_tiny_patch16_224"
SMALL = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
WEIGHT = "blocks.0.attn.qkv.weight"


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return timm.create_model(NAME, img_size=32, num_classes=0, **SMALL).state_dict()


def load(path, **kwargs):
    return load_encoder(str(path), model=NAME, model_kwargs=SMALL, img_size=32, **kwargs)


def behind(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def halves(state):
    """The same names with other values: what must not be taken."""
    return {name: tensor / 2 for name, tensor in state.items()}


PREFIXES = [
    *("", "module.", "_orig_mod.", "module._orig_mod.", "model.", "backbone.", "encoder.", "module.backbone."),
    *("model.encoder.", "_fsdp_wrapped_module.", "state_dict.module.model.", "visual.trunk."),
]


@pytest.mark.fault(
    "weights behind prefixes, in several models, beside other objects", "loaded; which was taken is said", tries=36
)
@pytest.mark.parametrize("form", ["pth", "nested", "safetensors"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_come_off(prefix, form, state, tmp_path):
    path = tmp_path / ("m.safetensors" if form == "safetensors" else "m.pth")
    if form == "safetensors":
        safetensors.torch.save_file(behind(prefix, state), path)
    else:
        torch.save(behind(prefix, state) if form == "pth" else {"model": behind(prefix, state)}, path)
    assert torch.equal(load(path)[0].state_dict()[WEIGHT], state[WEIGHT])


def test_wrappers_come_off_where_they_stand_inside(state, tmp_path):
    inside = {
        name.replace("attn.", "_orig_mod.attn.").replace("mlp.", "_checkpoint_wrapped_module.mlp."): t
        for name, t in state.items()
    }
    torch.save(inside, tmp_path / "m.pth")
    assert torch.equal(load(tmp_path / "m.pth")[0].state_dict()[WEIGHT], state[WEIGHT])


@pytest.mark.fault(
    "weights behind prefixes, in several models, beside other objects", "loaded; which was taken is said"
)
@pytest.mark.parametrize(
    ("content", "taken"),
    [
        (lambda w, other: {"state_dict": other, "state_dict_ema": w}, "state_dict_ema"),
        (lambda w, other: {"model": other, "model_ema": behind("module.", w)}, "model_ema.module"),
        (
            lambda w, other: {"student": behind("module.backbone.", other), "teacher": behind("backbone.", w)},
            "teacher.backbone",
        ),
        (lambda w, other: {**behind("teacher.", w), **behind("student.", other)}, "teacher"),
    ],
    ids=["EMA", "EMA of DDP", "DINO", "flat"],
)
def test_averaged_weights_are_taken_and_that_is_said(content, taken, state, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    torch.save(content(state, halves(state)), tmp_path / "m.pth")
    assert torch.equal(load(tmp_path / "m.pth")[0].state_dict()[WEIGHT], state[WEIGHT])
    assert f"took the weights at {taken};" in caplog.text


def test_a_key_picks_one_of_several(state, tmp_path):
    torch.save({"student": halves(state), "teacher": state}, tmp_path / "m.pth")
    for key, factor in (("student", 2), ("teacher", 1)):
        assert torch.equal(factor * load(tmp_path / "m.pth", key=key)[0].state_dict()[WEIGHT], state[WEIGHT])
    with pytest.raises(InputError, match=r"key: got 'ema', but .*m\.pth holds weights at student, teacher"):
        load(tmp_path / "m.pth", key="ema")
    torch.save({"first": halves(state), "second": state}, tmp_path / "m.pth")
    with pytest.raises(InputError, match=r"key: .*m\.pth holds several models, at first, second; say which"):
        load(tmp_path / "m.pth")


BESIDE = {
    "namespace": argparse.Namespace(out=pathlib.Path("/x"), lr=1e-3),
    "path": pathlib.PurePosixPath("/x"),
    "windows path": pathlib.PureWindowsPath("C:/x"),
    "numpy scalar": np.float64(0.5),
    "numpy array": np.arange(3.0),
    "numpy text": np.str_("x"),
    "defaultdict": collections.defaultdict(int, {"a": 1}),
    "defaultdict of lists": collections.defaultdict(list, {"a": [np.int64(1)]}),
    "counter": collections.Counter("abc"),
    "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]},
}


@pytest.mark.fault(
    "weights behind prefixes, in several models, beside other objects", "loaded; which was taken is said"
)
@pytest.mark.parametrize("thing", BESIDE.values(), ids=BESIDE)
def test_harmless_things_may_stand_beside_the_weights(thing, state, tmp_path):
    torch.save({"model": state, "beside": thing, "epoch": 3}, tmp_path / "m.pth")
    assert torch.equal(load(tmp_path / "m.pth")[0].state_dict()[WEIGHT], state[WEIGHT])


class Stranger:
    """Of a class that nobody else has."""


def test_other_objects_are_named_with_our_own_advice(state, tmp_path):
    torch.save({"model": state, "callback": Stranger()}, tmp_path / "m.pth")
    with pytest.raises(InputError, match=r"holds a Python object, '.*Stranger', beside its tensors") as refusal:
        load(tmp_path / "m.pth")
    assert "torch.save({'model': model.state_dict()}, FILE)" in str(refusal.value)
    assert "weights_only" not in str(refusal.value) and "add_safe_globals" not in str(refusal.value)


def test_numpys_own_classes_are_not_made(tmp_path):
    """A dtype's state says how memory is read: a forged one would let a pickle read and write anywhere."""
    forged = np.dtype("V8")

    class Forged:
        def __reduce__(self):
            flags = 63
            return np.dtype, ("V8", False, True), (3, "|", None, None, None, 8, 1, flags)

    torch.save({"model": {"x": torch.zeros(1)}, "beside": Forged()}, tmp_path / "m.pth")
    with pytest.raises(InputError, match="not a vision transformer"):
        load(tmp_path / "m.pth")
    assert np.dtype("V8") == forged and np.dtype("V8").flags == 0


def archive(path, members):
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)


def tar(path):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as file:
        info = tarfile.TarInfo("m.pth")
        info.size = 3
        file.addfile(info, io.BytesIO(b"abc"))


NOT_WEIGHTS = {
    "empty": (lambda p: p.write_bytes(b""), "is empty"),
    "LFS pointer": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "git lfs pull",
    ),
    "HTML": (lambda p: p.write_text("\n<!DOCTYPE html><html>quota exceeded</html>"), "is a web page"),
    "gzip": (lambda p: p.write_bytes(b"\x1f\x8b\x08" + bytes(99)), "gzip-compressed"),
    "tar": (tar, "is a tar archive"),
    "HDF5": (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "HDF5"),
    "npz": (lambda p: archive(p, {"a.npy": b"x"}), "NumPy archive"),
    "zip": (lambda p: archive(p, {"a.txt": b"x"}), "zip archive that torch.save did not write"),
    "text": (lambda p: p.write_text("not a checkpoint"), "can't? be read|can be read"),
    "numbers": (lambda p: torch.save({"epoch": 3}, p), "holds no tensors"),
    "list": (lambda p: torch.save([torch.zeros(1)], p), "holds no tensors"),
    "another network": (
        lambda p: torch.save({"layer1.0.conv1.weight": torch.zeros(1)}, p),
        "holds 1 tensors, the first layer1.0",
    ),
    "Hugging Face": (
        lambda p: torch.save({"vit.embeddings.patch_embeddings.projection.weight": torch.zeros(1)}, p),
        "the names are Hugging Face's",
    ),
    "flat patches": (
        lambda p: torch.save({"patch_embed.weight": torch.zeros(2, 3)}, p),
        r"it has 'patch_embed.weight', \(2, 3\), a patch embedding of another kind",
    ),
}


@pytest.mark.fault(
    "an LFS pointer, a web page, an archive or another network instead of weights",
    "called what it is, with the way out",
    tries=28,
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("what", NOT_WEIGHTS)
def test_what_is_no_checkpoint_is_called_what_it_is(what, suffix, tmp_path):
    write, message = NOT_WEIGHTS[what]
    path = tmp_path / f"m.{suffix}"
    write(path)
    if suffix == "safetensors" and what in (
        "text",
        "numbers",
        "list",
        "another network",
        "Hugging Face",
        "flat patches",
    ):
        message = "not a checkpoint that can be read"
    with pytest.raises(InputError, match=f"(?s)source: .*m.{suffix}.*({message})") as refusal:
        load(path)
    assert "\n" not in str(refusal.value)


def test_a_safetensors_file_under_another_name(state, tmp_path):
    safetensors.torch.save_file(state, tmp_path / "m.pth")
    load(tmp_path / "m.pth")


def expanded(state):
    return {**state, WEIGHT: torch.zeros(1).expand(10**6, 10**6)}


STRANGE = {
    "meta": (lambda s: {**s, WEIGHT: s[WEIGHT].to("meta")}, "is on the meta device"),
    "sparse": (lambda s: {**s, WEIGHT: s[WEIGHT].to_sparse()}, "is sparse"),
    "complex": (lambda s: {**s, WEIGHT: s[WEIGHT].to(torch.complex64)}, "is complex"),
    "quantized": (lambda s: {**s, WEIGHT: torch.quantize_per_tensor(s[WEIGHT], 0.1, 0, torch.qint8)}, "is quantized"),
    "expanded": (expanded, "claim .* MiB, more than the file can hold"),
    "scalar": (lambda s: {**s, WEIGHT: torch.tensor(1.0)}, r"is \(\) in the file"),
    "empty": (lambda s: {**s, "pos_embed": torch.zeros(1, 0, 48)}, r"pos_embed is \(1, 0, 48\) in the file"),
    "two dimensions": (lambda s: {**s, "patch_embed.proj.weight": torch.zeros(48, 192)}, r"is \(48, 192\) in the file"),
    "an unknown block": (lambda s: {**s, "blocks.x.y": torch.zeros(1)}, r"it has blocks\.x\.y"),
    "escapes": (lambda s: {**s, "\x1b[31mred\n": torch.zeros(1)}, r"it has \\x1b\[31mred\\n"),
    "NaN": (lambda s: {**s, WEIGHT: s[WEIGHT].clone().fill_(float("nan"))}, rf"{WEIGHT} is not finite \(6912 of 6912"),
    "Inf": (lambda s: {**s, "norm.bias": torch.full((48,), -torch.inf)}, r"norm\.bias is not finite \(48 of 48"),
}


@pytest.mark.fault(
    "meta, sparse, complex, quantized, expanded or misshapen tensors, NaN", "refused with the tensor's name"
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", STRANGE)
def test_strange_tensors_are_named(how, state, tmp_path):
    change, message = STRANGE[how]
    torch.save({"model": change(state)}, tmp_path / "m.pth")
    with pytest.raises(InputError, match=f"source: .*{message}") as refusal:
        load(tmp_path / "m.pth")
    assert str(refusal.value).isprintable()


@pytest.mark.fault(
    "meta, sparse, complex, quantized, expanded or misshapen tensors, NaN", "refused with the tensor's name"
)
def test_one_nan_stops_an_evaluation(state, tmp_path, capsys, image_folder):
    broken = {**state, WEIGHT: state[WEIGHT].clone()}
    broken[WEIGHT][0, 0] = float("nan")
    torch.save({"model": broken}, tmp_path / "m.pth")
    arguments = [
        str(tmp_path / "m.pth"),
        f"--data-path={image_folder}",
        "--model",
        NAME,
        "--model-kwargs",
        json.dumps(SMALL),
    ]
    assert evaluate_main(arguments) == 2
    assert f"CHECKPOINT: {tmp_path / 'm.pth'}: {WEIGHT} is not finite (1 of 6912 values)" in capsys.readouterr().err


@pytest.mark.fault("a weights file that unpacks to much more than it is", "refused in one line")
def test_a_zip_that_unpacks_to_much_more_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.pth", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("m/data.pkl", pickle.dumps({}))
        file.writestr("m/data/0", bytes(50 * 2**20))
    assert (tmp_path / "m.pth").stat().st_size < 2**20
    with pytest.raises(InputError, match="compressed zip archive"):
        load(tmp_path / "m.pth")


def deep(levels):
    node = {}
    for _ in range(levels):
        node = {"x": node}
    return node


@pytest.mark.parametrize("form", ["dictionary", "itself", "json"])
def test_depth_ends(form, state, tmp_path):
    """Dictionaries in dictionaries, one that holds itself, and a description of brackets."""
    if form == "json":
        safetensors.torch.save_file(state, tmp_path / "m.pth", {"tinymim_fast": '{"a":' * 100_000})
    else:
        node = deep(200)
        if form == "itself":
            node["x"] = node
        torch.save({"nested": node, "x": torch.zeros(1)}, tmp_path / "m.pth")
    with pytest.raises(InputError, match="source: "):
        load(tmp_path / "m.pth")


def damaged(content, rng):
    """`content` with a few bytes, a stretch, the end or the length changed."""
    data = bytearray(content)
    kind = rng.randrange(5)
    if kind == 0:
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == 1:
        del data[rng.randrange(len(data)) :]
    elif kind == 2:
        at = rng.randrange(len(data))
        data[at : at + rng.randrange(1, 400)] = rng.randbytes(rng.randrange(1, 400))
    elif kind == 3:
        at = rng.randrange(min(len(data), 4096))
        data[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**63 - 1, 2**64 - 1]))
    else:
        at = rng.randrange(min(len(data), 4096))
        data[at : at + 1] = rng.randbytes(1)
    return bytes(data)


def damaged_text(text, rng):
    """JSON with a value replaced by one of another kind or size."""
    values = ["null", "-1", "1e999", "[]", "{}", '"\\u0000"', "true", "99999999999999999999", "[[[[]]]]", "NaN"]
    parts = text.split(",")
    at = rng.randrange(len(parts))
    parts[at] = parts[at].split(":")[0] + ":" + rng.choice(values)
    return ",".join(parts)


@pytest.mark.fault("a weights file is damaged at random", "loads, or one line that names it", tries=600)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors", "description"])
def test_fuzzed_files_load_or_are_refused(form, state, tmp_path):
    """150 damaged files of each form: an `InputError` of one line, or a model; never another exception."""
    rng = random.Random(form)
    small = {name: tensor.half() for name, tensor in state.items()}
    info = {
        "architecture": NAME,
        "model_kwargs": {**SMALL, "img_size": 32},
        "kind": "mae",
        "head_layout": {"embed_dim": 48, "num_heads": [3, 3]},
        "recipe": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
        "step": 1,
        "epoch": 0.5,
        "preprocessing": {"crop_pct": 0.9, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    }
    path = tmp_path / ("m.pth" if form in ("zip", "legacy") else "m.safetensors")
    whole = {"model": small, "args": argparse.Namespace(lr=1e-3)}
    if form == "zip":
        torch.save(whole, path)
    elif form == "legacy":
        torch.save(whole, path, _use_new_zipfile_serialization=False)
    else:
        safetensors.torch.save_file(small, path, {"tinymim_fast": json.dumps(info)})
    load(path)
    good, refused = path.read_bytes(), 0
    for number in range(150):
        if form == "description":
            safetensors.torch.save_file(small, path, {"tinymim_fast": damaged_text(json.dumps(info), rng)})
        else:
            path.write_bytes(damaged(good, rng))
        try:
            load_encoder(str(path)) if form == "description" else load(path)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 2000, (number, str(error))
    assert refused > 50, "damage that does not show would prove nothing"
