"""Exports for where there is no timm: another runtime gives the model's numbers, for any number of images."""

import json
from pathlib import Path

import pytest
import torch

from support.classifiers import save_classifier
from tinymim_fast import export
from tinymim_fast.errors import InputError
from tinymim_fast.models import deployment
from tinymim_fast.models.checkpoints import load_encoder


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A classifier whose last block has other heads, which plain timm can't build, in both formats."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("exported")
    save_classifier(folder / "run", 5)
    export.export(str(folder / "run"), folder / "out", formats=["timm", "pt2", "onnx"])
    vit, info = load_encoder(str(folder / "run"))
    return folder / "out", vit.eval(), info


def outputs_in_fp64(vit, images):
    vit = vit.double()
    with torch.inference_mode():
        found = vit(images.double())
    vit.float()
    return found


@pytest.mark.parametrize("batch_size", [1, 4])
def test_onnxruntime_gives_the_models_logits(exported, batch_size):
    import onnxruntime

    out, vit, _ = exported
    images = torch.randn(batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(batch_size))
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images.numpy()})
    exact = outputs_in_fp64(vit, images)
    assert found.shape == (batch_size, 5) and exact.abs().min() > 1e-3
    with torch.inference_mode():
        error = (vit(images) - exact).abs().max()
    assert (torch.from_numpy(found) - exact).abs().max() <= 2 * error + 1e-5


@pytest.mark.parametrize("batch_size", [1, 4])
def test_pytorchs_program_gives_the_models_logits(exported, batch_size):
    out, vit, _ = exported
    images = torch.randn(batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(batch_size))
    with torch.inference_mode():
        torch.testing.assert_close(torch.export.load(out / "model.pt2").module()(images), vit(images))


def test_each_says_what_its_images_and_classes_are(exported):
    import onnx

    out, _, info = exported
    said = {"tinymim_fast.json": ""}
    torch.export.load(out / "model.pt2", extra_files=said)
    of_program = json.loads(said["tinymim_fast.json"])
    of_onnx = {p.key: json.loads(p.value) for p in onnx.load(out / "model.onnx").metadata_props}
    assert of_onnx == of_program
    assert of_program["mean"] == list(info.expects.mean) and of_program["img_size"] == 32
    assert of_program["head_layout"] == info.head_layout and of_program["model_kwargs"]["num_classes"] == 5
    assert {p.name for p in out.iterdir()} == {"config.json", "model.safetensors", "model.pt2", "model.onnx"}


def test_uneven_heads_need_no_import(tmp_path):
    from support.programs import TINY
    from tinymim_fast.models.checkpoints import save_weights
    from tinymim_fast.models.model_info import ModelInfo
    from tinymim_fast.models.vit import create_vit, head_layout

    kwargs = {**TINY, "num_heads": [3, 3, 6], "img_size": 32}
    vit = create_vit("vit_tiny_patch16_224", **kwargs).eval()
    save_weights(tmp_path, vit.state_dict(), ModelInfo("vit_tiny_patch16_224", kwargs, "tinymim", head_layout(vit)))
    assert export.main([str(tmp_path), str(tmp_path / "out"), "--formats", "pt2"]) == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.pt2"]
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.export.load(tmp_path / "out" / "model.pt2").module()(images), vit(images))


def test_a_file_that_differs_is_refused_and_nothing_is_left(tmp_path, monkeypatch, capsys):
    save_classifier(tmp_path / "run", 5)

    def spoil(program, path, said):
        program.state_dict["head.bias"] = torch.nn.Parameter(program.state_dict["head.bias"] + 1.0)
        torch.export.save(program, path)

    monkeypatch.setattr(deployment, "save_program", spoil)
    assert export.main([str(tmp_path / "run"), str(tmp_path / "out"), "--formats", "pt2"]) == 2
    assert "--formats: model.pt2 would differ from the model by" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_named_before_any_work(monkeypatch):
    monkeypatch.setattr(deployment.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else 1)
    with pytest.raises(InputError, match=r"onnx needs onnxscript: pip install 'tinymim_fast\[export\]'") as refusal:
        export.export("/nowhere", Path("/nowhere/out"), formats=["onnx"])
    assert refusal.value.argument == "formats"
