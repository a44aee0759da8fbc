"""The inference benchmark on tiny models: rows for each runtime, and its table."""

import csv

import pytest
import torch

pytest.importorskip("timm")

import readme_tables
import throughput
from support.programs import TINY
from tinymim_fast.models.vit import create_vit


@pytest.fixture
def tiny(monkeypatch):
    """A teacher and a student of 32 pixels in the places of the recipes' models."""

    def build(name):
        torch.manual_seed(0)
        width = {"B": 96, "T": 48}[name]
        return create_vit("vit_tiny_patch16_224", img_size=32, num_classes=5, **{**TINY, "embed_dim": width}).eval()

    monkeypatch.setattr(throughput, "build", build)
    monkeypatch.setattr(throughput, "IMG_SIZE", 32)


def test_rows_and_table(tiny, tmp_path):
    file = tmp_path / "throughput.csv"
    flags = ["--device", "cpu", "--providers", "B", "T", "--batch-sizes", "2", "--num-repeats", "2"]
    assert throughput.main([*flags, "--output", str(file)]) == 0
    rows = list(csv.DictReader(file.open()))
    ways = {(row["runtime"], row["precision"]) for row in rows}
    assert {("pytorch", "fp32"), ("pytorch", "bf16")} <= ways
    assert [row["status"] for row in rows] == ["ok"] * 2 * len(ways)
    for row in rows:
        assert float(row["images_per_s"]) == pytest.approx(2e3 / float(row["step_ms"]), rel=0.02)
    table = readme_tables.performance(tmp_path)
    assert "**Inference on " in table and "| ViT-T | 0.1 " in table and "x)" in table


def test_a_wrong_model_is_not_timed(tiny, tmp_path, monkeypatch):
    point = throughput.Point(sweep="runtimes", runtime="pytorch", precision="fp32", batch_size=1)
    right = throughput.runner

    def wrong(*of):
        run = right(*of)
        return lambda images: run(images) * 1.1

    monkeypatch.setattr(throughput, "runner", wrong)
    monkeypatch.setattr(throughput, "plan", lambda args: [point])
    file = tmp_path / "throughput.csv"
    throughput.main(["--device", "cpu", "--providers", "T", "--num-repeats", "1", "--output", str(file)])
    (row,) = csv.DictReader(file.open())
    assert row["status"] == "failed gate" and row["images_per_s"] == ""
