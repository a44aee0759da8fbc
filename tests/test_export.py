import json

import pytest
import safetensors
import timm
import torch

pytest.importorskip("deepspeed")

from support.programs import TINY, distill_flags
from support.runs import distil
from tinymim_fast import export
from tinymim_fast.config import parse
from tinymim_fast.errors import InputError
from tinymim_fast.evaluate import evaluate_knn
from tinymim_fast.models.checkpoints import latest_checkpoint, load_encoder, read_weights
from tinymim_fast.tasks import distill


@pytest.fixture(scope="module")
def run(world, image_folder, teacher_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "run"
    flags = distill_flags(image_folder, teacher_file, folder, epochs=1, relation_heads=6, mean="[0.5,0.5,0.5]")
    distil(world, *flags)
    return folder


def test_plain_timm_loads_it_with_the_same_features(run, tmp_path):
    assert export.main([str(run), str(tmp_path / "out")]) == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    state, _ = read_weights(run)
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, **TINY).eval()
    plain.load_state_dict(state)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), plain(images))
    assert tuple(model.pretrained_cfg["mean"]) == (0.5, 0.5, 0.5) and model.pretrained_cfg["interpolation"] == "bicubic"
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 32, 32)


def test_metadata_holds_head_layout_and_recipe(run, tmp_path):
    export.export(str(run), tmp_path / "out")
    described = json.loads((tmp_path / "out" / "config.json").read_text())["tinymim_fast"]
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["tinymim_fast"]) == described
    assert described["head_layout"] == {"embed_dim": 48, "num_heads": [3] * 3, "relation_heads": 6, "teacher_block": 3}
    assert described["recipe"]["relation_heads"] == 6 and described["step"] == 6
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}


def test_an_export_is_a_teacher_that_offers_its_relation_heads(run, world, image_folder, tmp_path):
    export.export(str(latest_checkpoint(run)), tmp_path / "out")
    flags = distill_flags(
        image_folder, tmp_path / "out", tmp_path / "next", teacher_model=None, teacher_model_kwargs="{}"
    )
    layout = distill.build_task(parse(distill.DistillConfig, flags, "p"), world, None).info.head_layout
    assert (layout["teacher_block"], layout["relation_heads"]) == (3, 6)


def test_refuses_to_overwrite_and_to_export_nothing(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(InputError, match="exists already"):
        export.export(str(run), tmp_path / "out")
    assert export.main([str(tmp_path / "nothing"), str(tmp_path / "new")]) == 2
    assert "no such checkpoint" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_pretrained_checkpoints_export_without_their_decoder(image_folder, teacher_file, tmp_path):
    vit, info = load_encoder(
        str(teacher_file), model="vit_tiny_patch16_224", model_kwargs={**TINY, "embed_dim": 96}, img_size=32
    )
    from tinymim_fast.models.checkpoints import save_weights

    save_weights(tmp_path, {**vit.state_dict(), "decoder_pred.bias": torch.zeros(3)}, info)
    export.export(str(tmp_path), tmp_path / "out")
    assert not any(k.startswith("decoder") for k in read_weights(tmp_path / "out")[0])


def test_knn_of_a_checkpoint(run, image_folder):
    accuracy = evaluate_knn(str(run), str(image_folder), batch_size=32)
    assert 0 <= accuracy <= 1
    assert evaluate_knn(str(run), str(image_folder), batch_size=7) == accuracy
    assert evaluate_knn(str(run), str(image_folder), untrained=True) != accuracy
