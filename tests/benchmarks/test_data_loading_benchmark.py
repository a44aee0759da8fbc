"""benchmarks/data_loading.py: one small run, and the gate."""

import csv

import numpy as np
import pytest
from PIL import ImageEnhance

pytest.importorskip("nvidia.dali")
pytest.importorskip("torchvision")

import data_loading as benchmark

SMALL = ["--device=cpu", "--num-images=12", "--min-images=8", "--num-repeats=1", "--batch-sizes=4", "--workers=1"]


def test_a_small_run(tmp_path, capsys):
    path = tmp_path / "results" / "data_loading.csv"
    flags = [*SMALL, "--batch-sizes", "4", "16", "--sweep", "views", "source", "batch"]
    assert benchmark.main([*flags, f"--output={path}"]) == 0
    with path.open() as file:
        rows = list(csv.DictReader(file))
    seen = {(row["sweep"], row["source"], row["views"], row["provider"]) for row in rows}
    ours, users = {"dali_cpu", "fallback"}, {"torchvision", "torchvision_v2"}
    assert seen == {
        *(("views", "folder", views, name) for views in "12" for name in (*ours, *users)),
        *(("source", "folder", "2", name) for name in (*ours, *users)),
        *(("source", "tar", "2", name) for name in ours),
        *(("batch", "folder", "2", name) for name in (*ours, *users)),
    }
    for row in rows:
        assert row["status"] == "ok" and float(row["images_per_s"]) > 0 and float(row["cpu_ms_per_image"]) > 0
        assert float(row["images_per_s"]) == pytest.approx(4000 / float(row["step_ms"]), rel=0.01)
        assert 0.5 < float(row["wait_share"]) <= 1.001, "nothing but waiting for batches is done"
        assert 90 < float(row["kib_per_image"]) < 130, "JPEGs of ImageNet's size"
        assert (row["mean_difference"] == "") == (row["provider"] in users)
    output = capsys.readouterr().out
    assert "as fast as torchvision" in output
    assert "left out, for there are 12 images: folder, 2 views, batch 16" in output


def test_wrong_views_get_no_number(monkeypatch, capsys):
    from tinymim_fast.data import dali_loader as dali

    def brighter(image, factor):
        return np.asarray(ImageEnhance.Brightness(benchmark.Image.fromarray(image)).enhance(1.1))

    monkeypatch.setattr(dali, "_saturate_on_cpu", brighter)
    assert benchmark.main([*SMALL, "--sweep=views", "--providers", "dali_cpu"]) == 1
    captured = capsys.readouterr()
    assert "failed gate" in captured.out and "dali_cpu: failed gate" in captured.err


def test_a_gpu_that_is_not_there_is_named(monkeypatch, capsys):
    monkeypatch.setattr(benchmark.torch.cuda, "is_available", lambda: False)
    for flags, message in (("--device=cuda", "sees no GPU"), ("--providers=dali_mixed", "can't run on --device cpu")):
        with pytest.raises(SystemExit):
            benchmark.main([flags])
        assert message in capsys.readouterr().err


def test_bad_folders_are_named(tmp_path, capsys):
    assert benchmark.main([*SMALL, f"--data-path={tmp_path / 'none'}"]) == 2
    assert capsys.readouterr().err.startswith("data_loading.py: --data-path: got ")
