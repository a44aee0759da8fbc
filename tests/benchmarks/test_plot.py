"""benchmarks/plot.py makes the pictures that a result file allows."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import harness
import plot
import relation_loss
import roofs
import sweep
from loss_point import Point

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def results(tmp_path):
    """As from a GPU: presets and a sweep over N in which official runs out of memory."""
    file = sweep.Results(tmp_path / "gpu.csv", torch.device("cpu"))
    preset = Point(dtype="bfloat16", batch_size=8, preset="S", **relation_loss.PRESETS["S"])
    tokens = [replace(preset, sweep="tokens", num_tokens=n) for n in (197, 577, 1025)]

    def measure(point):
        measured = {}
        for provider, step_ms in (("official", 9.0), ("compile", 3.0), ("triton", 1.0)):
            if provider == "official" and point.num_tokens > 197:
                measured[provider] = {"status": harness.OUT_OF_MEMORY}
            else:
                rates = relation_loss.throughput(point, step_ms, roofs.H200_UNDER_LOAD)
                times = harness.percentiles([step_ms, 1.1 * step_ms])
                measured[provider] = {"peak_extra_mib": 100 * step_ms, **times, **rates}
        return measured

    points = [preset, replace(preset, mode="forward"), *tokens]
    sweep.run(points, measure, file, columns=relation_loss.COLUMNS, show=lambda rows: None)
    return file.path


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def texts(figure):
    axes = figure.axes
    return [text.get_text() for ax in axes for text in [*ax.texts, *ax.get_yticklabels()]]


def test_pictures_of_a_result_file(results, tmp_path):
    plot.main([str(results), "--output-dir", str(tmp_path / "pictures")])
    made = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    kinds = [f"{sweep}_{what}" for sweep in ("presets", "tokens") for what in ("memory", "roof", "time")]
    assert made == [f"gpu_{kind}.png" for kind in kinds]
    for name in made:
        assert (tmp_path / "pictures" / name).read_bytes().startswith(b"\x89PNG")


def test_what_is_written_in_the_pictures(results):
    by_name = dict(plot.figures(read(results)))
    assert {"official (out of memory)", "compile", "triton"} <= set(texts(by_name["tokens_time"]))
    # Medians of 9 and 9.9, of 1 and 1.1 ms.
    assert any("9.45" in text and "(9x triton)" in text for text in texts(by_name["presets_time"]))
    footer = by_name["presets_time"].texts[-1].get_text()
    assert torch.__version__ in footer and sweep.environment(torch.device("cpu"))["commit"] in footer


def test_names_are_spread():
    assert plot.spread([0, 100], gap=10) == [0, 100]
    assert plot.spread([50, 50, 52, 200], gap=10) == pytest.approx([122 / 3, 152 / 3, 182 / 3, 200], abs=1)


def test_other_files_are_refused(tmp_path, capsys):
    other, pictures = tmp_path / "other.csv", tmp_path / "pictures"
    other.write_text("benchmark,provider\ntrain_step,chunked\n")
    plot.main([str(other), "--output-dir", str(pictures)])
    assert "no rows of relation_loss or data_loading" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        plot.main([str(tmp_path / "absent.csv"), "--output-dir", str(pictures)])
    assert "no such file" in capsys.readouterr().err
    assert not pictures.exists()


def test_pictures_of_loading(tmp_path):
    results = ROOT / "benchmarks" / "results" / "data_loading_cpu.csv"
    by_name = dict(plot.figures(read(results)))
    sweeps = {"views", "source", "workers", "batch", "pause"} & {row["sweep"] for row in read(results)}
    assert {name.removesuffix("_rate") for name in by_name if name.endswith("_rate")} == sweeps
    assert "pause_wait" in by_name and {"dali_cpu", "torchvision"} <= set(texts(by_name["views_rate"]))
