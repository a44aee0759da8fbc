"""benchmarks/relation_loss.py: the gate, what becomes of peers that fail, the plan, and one small run."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import loss_point
import providers
import relation_loss as benchmark
import sweep

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")
SMALL = {"batch_size": 2, "num_heads": 2, "num_tokens": 11, "head_dim_s": 4, "head_dim_t": 8}
POINT = loss_point.Point(dtype="float32", **SMALL)


def measure(compared, point=POINT):
    measured = benchmark.measure(point, compared, CPU, num_repeats=2)
    return {row["provider"]: row for row in sweep.rows_of(point, measured, benchmark.COLUMNS)}


def test_failing_peers_are_rows_without_numbers():
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    def does_not_compile(*_):
        raise RuntimeError("no such instruction\nand a long explanation")

    def wrong_gradient(student, *args):
        # The right loss; the gradient is 1 + 1e-4 times the right one.
        return providers.eager(student + 1e-4 * (student - student.detach()), *args)

    def wrong_loss(*args):
        return providers.eager(*args) + 1e-4

    def not_finite(*args):
        return providers.eager(*args) * torch.nan

    rows = measure(
        {
            "chunked": providers.PROVIDERS["chunked"],
            "out_of_memory": out_of_memory,
            "does_not_compile": does_not_compile,
            "wrong_gradient": wrong_gradient,
            "wrong_loss": wrong_loss,
            "not_finite": not_finite,
        }
    )
    assert {name: row["status"] for name, row in rows.items()} == {
        "chunked": "ok",
        "out_of_memory": "out of memory",
        "does_not_compile": "not available",
        "wrong_gradient": "failed gate",
        "wrong_loss": "failed gate",
        "not_finite": "failed gate",
    }
    assert rows["does_not_compile"]["detail"] == "RuntimeError: no such instruction"
    assert 0.5e-4 < rows["wrong_gradient"]["grad_error"] < 2e-4
    numbers = ("step_ms", "gb_per_s", "tflop_per_s", "peak_extra_mib", "num_repeats")
    for name, row in rows.items():
        assert all((row[number] is not None) == (name == "chunked") for number in numbers), row
    assert sweep.ratios_to_peers(list(rows.values())) == {}


def test_peer_that_fails_while_timed_leaves_the_others():
    calls = []

    def fails_later(*args):
        calls.append(1)
        if len(calls) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return providers.eager(*args)

    rows = measure({"eager": providers.eager, "fails_later": fails_later})
    assert (rows["eager"]["status"], rows["fails_later"]["status"]) == ("ok", "out of memory")
    assert rows["fails_later"]["step_ms"] is None


@pytest.mark.parametrize(
    ("mode", "layout", "dtype", "relations"),
    [
        ("forward_backward", "packed", "float32", "qk+vv"),
        ("forward_backward", "bhnd", "bfloat16", "qk"),  # v gets no gradient
        ("forward", "bhnd", "float16", "qk+vv"),
    ],
)
def test_all_providers_pass_the_gate(mode, layout, dtype, relations):
    # "padded" is what compile_padded compiles.
    point = loss_point.Point(mode=mode, layout=layout, dtype=dtype, relations=relations, **SMALL)
    compared = {name: providers.PROVIDERS[name] for name in ("official", "eager", "chunked")}
    rows = measure({**compared, "padded": providers.padded}, point)
    assert {row["status"] for row in rows.values()} == {"ok"}, rows
    assert all((row["grad_error"] is None) == (mode == "forward") for row in rows.values())


def test_oracle_does_not_depend_on_its_chunks():
    inputs = loss_point.make_inputs(POINT, CPU, seed=0)
    whole, pieces = (loss_point.make_oracle(POINT, inputs, map_bytes) for map_bytes in (2**26, 1))
    torch.testing.assert_close(whole.loss, pieces.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(whole.grad, pieces.grad, rtol=1e-9, atol=1e-15)


def test_plan_begins_with_what_matters_most():
    points = benchmark.parse_args(["--device", "cpu", "--sweep", "all"]).points
    first = points[0]
    assert (first.preset, first.mode, first.num_heads, first.head_dim_s) == ("B", "forward_backward", 16, 48)
    assert [point.mode for point in points[:6]] == ["forward_backward"] * 3 + ["forward"] * 3
    assert {point.sweep for point in points} == set(benchmark.SWEEPS)
    tokens = [point for point in points if point.sweep == "tokens"]
    assert [point.num_tokens for point in tokens] == [197, 257, 577, 1025]
    (own,) = benchmark.parse_args(["--device", "cpu", "--head-dim-s", "24", "--modes", "forward"]).points
    assert (own.preset, own.head_dim_s, own.num_heads) == ("", 24, 16)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sweep", "tokens", "--num-tokens", "50"], "--num-tokens"),
        (["--relations", "qv"], "--relations: got 'qv'"),
        (["--batch-size", "0"], "--batch-size"),
    ],
)
def test_impossible_flags_are_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        benchmark.parse_args(["--device", "cpu", *flags])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def run(path, *flags):
    """Rows and output of the program, started as its users start it."""
    command = [sys.executable, ROOT / "benchmarks" / "relation_loss.py", "--num-repeats", "2", "--output", path, *flags]
    unset = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "TRITON_INTERPRET")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    env["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    with path.open() as file:
        return list(csv.DictReader(file)), done.stdout


def test_small_run(tmp_path):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    rows, output = run(tmp_path / "results.csv", "--device=cpu", "--providers", "official", "chunked", *flags)
    assert "OMP_WAIT_POLICY=passive, GOMP_SPINCOUNT=3000" in output
    assert "not measured here" in output and "as fast as official" in output
    assert [(row["mode"], row["provider"]) for row in rows] == [
        (mode, provider) for mode in ("forward_backward", "forward") for provider in ("official", "chunked")
    ]
    point = list(loss_point.Point.__dataclass_fields__)
    assert list(rows[0]) == [*point, "provider", "status", "detail", *benchmark.COLUMNS, *sweep.environment(CPU)]
    with (ROOT / "benchmarks" / "results" / "relation_loss_cpu.csv").open() as file:
        assert next(csv.reader(file)) == list(rows[0]), "committed results have the columns of today"
    for row in rows:
        assert (row["status"], row["num_repeats"], row["device_type"]) == ("ok", "2", "cpu")
        assert 0 < float(row["step_ms_p20"]) <= float(row["step_ms"]) <= float(row["step_ms_p80"])
        assert row["hbm_share"] == row["floor_share"] == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_small_run_on_a_gpu(tmp_path):
    rows, output = run(tmp_path / "results.csv", "--preset", "S", "--batch-size", "8", "--device=cuda")
    assert "roofs measured now" in output
    assert {(row["provider"], row["status"]) for row in rows} == {(name, "ok") for name in providers.PROVIDERS}
    assert all(0 < float(row["floor_share"]) < 1 for row in rows), rows
    assert all(0 < float(row["hbm_share"]) < 1 and 0 < float(row["matmul_share"]) < 1 for row in rows), rows
    extra_mib = {row["provider"]: float(row["peak_extra_mib"]) for row in rows if row["mode"] == "forward_backward"}
    assert extra_mib["triton"] < extra_mib["compile"] < extra_mib["official"]
