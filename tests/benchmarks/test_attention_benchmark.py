"""benchmarks/attention.py: the gate, kernels that can't run, and the table that it makes."""

import pytest
import torch

pytest.importorskip("timm")

import attention as benchmark
import harness
import sweep
from tinymim_fast.models import attention

CPU = torch.device("cpu")
POINT = benchmark.Point(dtype="float32", batch_size=3, num_heads=2, num_tokens=17, head_dim=8)


def measure(kernels, point=POINT):
    measured = benchmark.measure(point, kernels, CPU, num_repeats=2)
    return {row["provider"]: row for row in sweep.rows_of(point, measured, benchmark.COLUMNS)}


@pytest.mark.parametrize("dtype", benchmark.DTYPES)
@pytest.mark.parametrize("mode", benchmark.MODES)
def test_kernels_that_run_pass_and_others_say_why(dtype, mode):
    point = benchmark.Point(**{**vars(POINT), "dtype": dtype, "mode": mode})
    rows = measure(["sdpa", "math", "flash", "cudnn"], point)
    assert [row["status"] for row in rows.values()] == [harness.OK] * 3 + [harness.NOT_AVAILABLE]
    assert "can't run on cpu" in rows["cudnn"]["detail"] and rows["cudnn"]["step_ms"] is None
    for name in ("sdpa", "math", "flash"):
        assert rows[name]["step_ms"] > 0 and rows[name]["tflop_per_s"] > 0
        assert (rows[name]["grad_error"] is None) == (mode == "forward")
        assert rows[name]["architecture"] == attention.architecture(CPU)


def test_a_wrong_gradient_gets_no_number(monkeypatch):
    def wrong(kernel, q, k, v):
        out = attention.attend(kernel, q, k, v)
        return out + 1e-3 * (v - v.detach())

    monkeypatch.setattr(benchmark, "attend", wrong)
    row = measure(["math"])["math"]
    assert row["status"] == harness.FAILED_GATE and row["out_error"] < 1e-6 < row["grad_error"]


def rows_of(times, **changes):
    """Of `times` by kernel and number of heads."""
    row = {"sweep": "vits", "status": "ok", "architecture": "cpu_x", "dtype": "float32", "mode": "forward", **changes}
    return [
        {**row, "provider": kernel, "num_heads": str(heads), "step_ms": str(ms)}
        for kernel, of_heads in times.items()
        for heads, ms in of_heads.items()
    ]


def test_the_table_takes_what_wins_and_never_loses():
    sdpa = {3: 10.0, 12: 40.0}
    key = ("cpu_x", "float32", False)
    assert benchmark.table(rows_of({"sdpa": sdpa, "math": {3: 8.0, 12: 36.0}, "flash": {3: 9.0, 12: 38.0}})) == {
        key: "math"
    }
    assert benchmark.table(rows_of({"sdpa": sdpa, "math": {3: 2.0, 12: 44.0}})) == {}, "slower at 12 heads"
    assert benchmark.table(rows_of({"sdpa": sdpa, "math": {3: 9.7, 12: 39.0}})) == {}, "as fast"
    assert benchmark.table(rows_of({"sdpa": sdpa, "math": {3: 8.0, 12: 36.0}}, sweep="tokens")) == {}
    assert benchmark.table(rows_of({"math": {3: 1.0}})) == {}, "nothing to compare with"


def test_the_table_is_written_where_it_is_read():
    source = benchmark.TABLE_FILE.read_text()
    taken = {("sm_90", "bfloat16", True): "flash", ("cpu_x", "float32", False): "math"}
    for table in (taken, {}):
        written = benchmark.with_table(source, table)
        namespace = {}
        exec(compile(written, "attention.py", "exec"), {"__name__": "written"}, namespace)
        assert namespace["MEASURED"] == {(a, getattr(torch, d), g): name for (a, d, g), name in table.items()}
        assert benchmark.with_table(written, benchmark.committed_table()) == source, "the rest is as it was"


def test_the_product_has_the_table_of_the_committed_results():
    table = {
        (arch, getattr(torch, dtype), grad): name for (arch, dtype, grad), name in benchmark.committed_table().items()
    }
    assert table == attention.MEASURED, "python benchmarks/attention.py --write-table"
