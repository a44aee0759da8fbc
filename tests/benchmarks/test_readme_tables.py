"""The README's tables are what the committed result files say."""

import csv
import json
from pathlib import Path

import pytest

import readme_tables

ROOT = Path(__file__).parent.parent.parent
EMPTY = "".join(
    f"# {name}\n<!-- {name}: made by `make readme-tables` -->\n<!-- /{name} -->\n"
    for name in ("performance", "study", "proof", "reliability")
)
LOSS = {
    "benchmark": "relation_loss",
    "sweep": "presets",
    "preset": "B",
    "mode": "forward_backward",
    "relations": "qk+vv",
    "dtype": "bfloat16",
    "batch_size": "256",
    "num_tokens": "197",
    "provider": "triton",
    "status": "ok",
    "step_ms": "2.0",
    "peak_extra_mib": "10.2",
    "device_type": "cuda",
    "device": "GPU 1",
    "num_threads": "8",
    "torch": "2.11",
    "commit": "abc",
    "date": "2026-01-02",
}
STEP = {
    "benchmark": "train_step",
    "sweep": "pairs",
    "pair": "L-B",
    "precision": "bf16",
    "zero_stage": "1",
    "batch_size": "128",
    "provider": "ours",
    "status": "ok",
    "step_ms": "100",
    "images_per_s": "1280.00",
    "teacher_ms": "40",
    "forward_ms": "20",
    "backward_ms": "30",
    "optimizer_ms": "10",
    "loss_ms": "3.21",
    **{name: LOSS[name] for name in ("device_type", "device", "num_threads", "torch", "commit", "date")},
}
GPU = {"cuda": True, "gpu": "GPU 1", "versions": {"nvidia-dali-cuda130": None}}


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


LOADING = {
    "benchmark": "data_loading",
    "sweep": "views",
    "views": "2",
    "batch_size": "64",
    "num_workers": "2",
    "provider": "dali_cpu",
    "status": "ok",
    "step_ms": "128",
    "images_per_s": "500.0",
    "cpu_ms_per_image": "3.5",
    "kib_per_image": "107.1",
    **{name: LOSS[name] for name in ("device_type", "device", "commit", "date")},
}


def losses(**changes):
    return [
        {**LOSS, **changes},
        {**LOSS, "provider": "official", "step_ms": "9.0", "peak_extra_mib": "6000", **changes},
        {**LOSS, "provider": "compile", "step_ms": "1.6", "peak_extra_mib": "900", **changes},
        {**LOSS, "provider": "chunked", "status": "out of memory", "step_ms": "", "peak_extra_mib": "", **changes},
        {**LOSS, "mode": "forward", "step_ms": "0.5", **changes},
    ]


def lines_of(results):
    """The performance table by its first column."""
    text = readme_tables.render(EMPTY, results).partition("# proof")[0]
    return {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}


def test_readme_is_what_the_files_say():
    readme = (ROOT / "README.md").read_text()
    assert readme_tables.render(readme, readme_tables.RESULTS) == readme, "run make readme-tables and commit README.md"


def test_performance(tmp_path):
    write(
        tmp_path / "gpu-1" / "day" / "relation_loss.csv",
        *reversed(losses()),
        {**LOSS, "provider": "newcomer", "step_ms": "4.0"},
    )
    write(
        tmp_path / "gpu-1" / "day" / "train_step.csv",
        STEP,
        {**STEP, "provider": "official_loop", "step_ms": "125", "images_per_s": "1024"},
        {**STEP, "sweep": "zero", "images_per_s": "900"},
    )
    lines = lines_of(tmp_path)
    assert [cell.strip() for cell in lines[""].split("|")[2:-1]] == ["L-B, bf16"]  # the last table
    cells = {name: [cell.strip() for cell in line.split("|")[2:-1]] for name, line in lines.items()}
    assert cells["**`triton`**"] == ["2.00", "10"]
    assert cells["**`train.py`**"] == ["1280"]
    assert cells["official loop"] == ["1024 (1.25x)"]
    assert cells["official formula"] == ["9.00 (4.50x)", "6000"]
    assert cells["`torch.compile`"] == ["1.60 (0.80x)", "900"]  # who is faster than we are stays in
    assert cells["newcomer"] == ["4.00 (2.00x)", "10"]
    assert cells["**`chunked`**"] == ["out of memory", "out of memory"]
    text = readme_tables.performance(tmp_path)
    assert "teacher 40%, forward 20%, backward 30%, optimizer 10%; the loss alone 3.21 ms" in " ".join(text.split())
    write(tmp_path / "gpu-1" / "day" / "relation_loss.csv", *losses(step_ms="3.0"))
    assert "3.00" in lines_of(tmp_path)["**`triton`**"]


def test_the_newest_date_of_each_device_counts(tmp_path):
    write(tmp_path / "a.csv", *losses(step_ms="7.0"))
    write(tmp_path / "b.csv", *losses(date="2026-01-03"))
    write(tmp_path / "c.csv", *losses(device="a CPU", device_type="cpu", date="2026-01-01", step_ms="500"))
    write(tmp_path / "aot_report.csv", {"target": "sm_90"})
    text = readme_tables.render(EMPTY, tmp_path)
    assert "7.00" not in text and "2.00" in text and "500" in text
    assert text.index("**GPU 1**") < text.index("**a CPU, 8 threads**")
    assert "![" not in text
    (tmp_path / "cpu_tokens_time.png").touch()
    assert (
        text.count("![") == 0
        and readme_tables.render(EMPTY, tmp_path).count("](benchmarks/results/cpu_tokens_time.png)") == 1
    )


def test_a_note_stands_with_its_table(tmp_path):
    write(tmp_path / "here" / "relation_loss.csv", *losses())
    write(tmp_path / "there" / "relation_loss.csv", *losses(device="GPU 2"))
    (tmp_path / "there" / "note.txt").write_text("Measured beside\nother jobs.\n")
    first, second = readme_tables.performance(tmp_path).split("**GPU 2**")
    assert "Measured" not in first and "Measured beside other jobs." in " ".join(second.split())


def test_nothing_measured(tmp_path):
    text = readme_tables.render(EMPTY, tmp_path)
    assert "Not measured yet." in text and text.count("| not proven |") == len(readme_tables.PROOFS)
    assert readme_tables.render(text, tmp_path) == text
    with pytest.raises(ValueError, match="no section between"):
        readme_tables.render("# A README without markers\n", tmp_path)


@pytest.mark.parametrize(
    ("states", "found", "wanted"),
    [
        ({"kernel_tests": "passed"}, GPU, {"fused": "tested on GPU 1, 2026-01-02: 3 passed, 0 failed |"}),
        (
            {"kernel_tests": "failed"},
            GPU,
            {"fused": "**fails** on GPU 1, 2026-01-02: kernel_tests (3 passed, 0 failed) |"},
        ),
        ({"kernel_tests": "left out"}, GPU, {"fused": "not proven |"}),
        (
            {"memcheck": "passed", "racecheck": "left out"},
            GPU,
            {"their memory": "tested on GPU 1, 2026-01-02, without racecheck |"},
        ),
        ({"other_gpu_tests": "passed"}, GPU, {"DALI": "not proven |"}),  # passed without DALI
        (
            {"other_gpu_tests": "passed"},
            {**GPU, "versions": {"nvidia-dali-cuda120": "2.4"}},
            {"DALI": "tested on GPU 1"},
        ),
        ({"kernel_tests": "passed"}, {"cuda": False}, {"fused": "not proven |"}),
    ],
)  # fmt: skip
def test_proof(states, found, wanted, tmp_path):
    parts = [
        {"part": part, "state": state, "reason": "", "figure": "3 passed, 0 failed" if "tests" in part else ""}
        for part, state in states.items()
    ]
    (tmp_path / "summary.json").write_text(json.dumps({"date": "2026-01-02", "parts": parts}))
    (tmp_path / "environment.json").write_text(json.dumps(found))
    lines = readme_tables.proof(tmp_path).splitlines()
    for head, cell in wanted.items():
        (line,) = [line for line in lines if line.startswith(f"| {head}")]
        assert cell in line


def test_headline():
    rows = losses()
    assert readme_tables.headline(rows) == (
        "ViT-B forward_backward: triton 2.00 ms, official 4.50x, compile 0.80x, chunked out of memory"
    )
    assert readme_tables.headline([STEP]) == "L-B bf16: ours 100 ms, 1280 images/s"
    with pytest.raises(ValueError, match="no time of triton or chunked or ours"):
        readme_tables.headline([{**row, "step_ms": ""} for row in rows])


def test_loading(tmp_path):
    peer = {**LOADING, "provider": "torchvision", "images_per_s": "250.0", "cpu_ms_per_image": "7.5"}
    failed = {**LOADING, "provider": "fallback", "status": "failed gate", "images_per_s": "", "cpu_ms_per_image": ""}
    one_view = {**LOADING, "views": "1", "images_per_s": "800.0"}
    write(
        tmp_path / "data_loading.csv",
        LOADING,
        failed,
        peer,
        one_view,
        {**LOADING, "sweep": "batch", "images_per_s": "1"},
    )
    lines = lines_of(tmp_path)
    cells = {name: [cell.strip() for cell in line.split("|")[2:-1]] for name, line in lines.items()}
    assert cells[""] == ["images/s, 2 views", "images/s, 1 view", "CPU ms / image, 2 views"]
    assert cells["**DALI**"] == ["500 (2.00x)", "800", "3.50"]
    assert cells["`--loader torchvision`"] == ["failed gate", "", ""]
    assert cells["torchvision, PIL"] == ["250", "", "7.50"]
