"""What the kernels compile to for an H100 or H200, without one: the figures that the code was written for."""

import csv
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import triton

import aot_guard

ROOT = Path(__file__).parent.parent.parent
REPORT = ROOT / "benchmarks" / "aot_report.py"
# At N=197, D_t=64, by D_s: microseconds in which an H200 issues one relation's instructions at B=256, H=12.
ISSUE_US = {16: 115, 32: 125, 64: 150}
# What the shipped tiles take by the simulation's middle latencies: QK and VV with gradients, and one relation without.
SIMULATED_US = {16: (410, 155), 32: (585, 155), 64: (805, 170)}
# Dwords that the shipped tiles of sm_90 spill, at most, where two blocks an SM on four warps pay for it in the
# simulation with all spills in L2; benchmarks/NOTES.md has the figures. Everything else spills nothing.
SPILLS = {
    **{("197", d_s, "bfloat16", use): 115 for d_s in ("16", "32") for use in ("qk", "loss")},
    ("197", "64", "bfloat16", "d_x"): 15,
    ("128", "64", "float16", "qk+vv"): 20,
}
# The second launch, whose loop over maps takes a few registers, where rows need their maximum.
SPILLS_OF_EXACT = 3


def report_of_sm_90(folder: Path, *flags: str) -> list[dict[str, str]]:
    """Rows of the report, made in a process of its own: kernels are interpreted in this one."""
    path = folder / "report.csv"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    command = [sys.executable, str(REPORT), "--targets", "sm_90", *flags, "--output", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return list(csv.DictReader(path.open()))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """What ViTs of 224 pixels meet in training."""
    return report_of_sm_90(tmp_path_factory.mktemp("aot"), "--num-tokens", "197", "--dtypes", "bfloat16")


@pytest.fixture(scope="module")
def committed():
    return list(csv.DictReader((ROOT / "benchmarks" / "results" / "aot_report.csv").open()))


@pytest.fixture
def same_triton(committed):
    made_with = aot_guard.made_with(committed)
    if made_with != triton.__version__:
        pytest.skip(
            f"aot_report.csv was made with Triton {made_with}, this is {triton.__version__}: other machine code"
        )


@pytest.mark.usefixtures("same_triton")
def test_committed_report_is_of_this_code(rows, committed):
    of_vits = {"target": "sm_90", "num_tokens": "197", "dtype": "bfloat16"}
    assert [row for row in committed if of_vits.items() <= row.items()] == rows


@pytest.mark.slow
@pytest.mark.usefixtures("same_triton")
def test_the_whole_committed_report_is_of_this_code(committed, tmp_path):
    assert [row for row in committed if row["target"] == "sm_90"] == report_of_sm_90(tmp_path)


@pytest.mark.usefixtures("same_triton")
def test_no_spills(rows, committed):
    assert {row["target"] for row in committed} == {"sm_80", "sm_89", "sm_90", "sm_100", "gfx942"}
    for row in rows + committed:
        shape = tuple(row[name] for name in ("num_tokens", "head_dim_s", "dtype", "use"))
        allowed = SPILLS.get(shape, 0) if row["target"] == "sm_90" and row["head_dim_t"] == "64" else 0
        if row["kernel"] == "single_pass_exact":
            allowed = max(allowed, SPILLS_OF_EXACT)
        assert int(row["spill_stores"]) <= allowed and int(row["spill_loads"]) <= allowed, row


def test_no_worse_than_before():
    try:
        worse, vanished = aot_guard.check()
    except aot_guard.NoPredecessor as reason:
        pytest.skip(f"{reason}")
    for row in vanished:
        warnings.warn(f"aot_report.csv no longer has {row}", stacklevel=1)
    assert not worse, worse


@pytest.mark.usefixtures("same_triton")
@pytest.mark.parametrize("head_dim_s", ISSUE_US)
def test_single_pass_at_vit_shapes(rows, head_dim_s):
    of_relation = [
        row
        for row in rows
        if tuple(row[name] for name in ("num_tokens", "head_dim_s", "head_dim_t", "dtype", "use"))
        == ("197", str(head_dim_s), "64", "bfloat16", "qk")
    ]
    assert [row["kernel"] for row in of_relation] == ["single_pass", "single_pass_exact"]
    for row in of_relation:
        # Two exponentials an element; the rest is one reciprocal per row in each of the lanes that hold the row.
        assert float(row["mufu_per_element"]) <= 2.2
        assert int(row["hgmma"]) > 0
    assert sum(float(row["issue_us"]) for row in of_relation) <= ISSUE_US[head_dim_s]


@pytest.mark.usefixtures("same_triton")
@pytest.mark.parametrize("head_dim_s", SIMULATED_US)
def test_simulated_time_at_vit_shapes(rows, head_dim_s):
    for use, limit in zip(("loss", "forward"), SIMULATED_US[head_dim_s], strict=True):
        times = [
            float(row["simulated_us"])
            for row in rows
            if (row["num_tokens"], row["head_dim_s"], row["head_dim_t"], row["use"])
            == ("197", str(head_dim_s), "64", use)
        ]
        assert len(times) == 2 and max(times) <= limit


def test_report_refuses_the_interpreter():
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(REPORT)], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 1 and "TRITON_INTERPRET" in done.stderr
