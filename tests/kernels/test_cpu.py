"""The compiled loops of backend "chunked": built once, by whole files, or not at all; right for every vector unit."""

import os
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from support.relations import inputs, loss_and_grads
from tinymim_fast.kernels import cpu, relation_kl

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.skipif(not cpu.takes(torch.empty(0)), reason="no C++ compiler")
SHAPES = [(2, 3, 197, 16, 32), (1, 2, 5, 3, 7), (1, 2, 33, 130, 24), (2, 2, 1, 1, 1)]


@pytest.fixture
def forgotten(tmp_path, monkeypatch):
    """No library is loaded yet, the cache is empty, and what a test loads is not kept for others."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv(cpu.SWITCH, raising=False)
    cpu._library.cache_clear()
    yield
    cpu._library.cache_clear()


def check(shapes=SHAPES):
    """Whether the loops are there, once the results are right with or without them; and the warnings."""
    cpu._library.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for shape in shapes:
            for dtype in (torch.float32, torch.float64):
                tensors = inputs(shape, dtype)
                ours = loss_and_grads(relation_kl, *tensors, backend="chunked", reduction="sum")
                double = [z.double() for z in tensors]
                exact = loss_and_grads(relation_kl, *double, backend="reference", reduction="sum")
                allowed = 200 * torch.finfo(dtype).eps * max(z.abs().max() for z in exact)
                assert all((a - b).abs().max() <= allowed for a, b in zip(ours, exact))
    return cpu.takes(torch.empty(0)), [str(w.message) for w in caught if w.category is RuntimeWarning]


def compiler(path, script):
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.usefixtures("forgotten")
def test_compiled_once_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", compiler(tmp_path / "counting", f'echo "$@" >> {tmp_path}/calls; exec g++ "$@"'))
    assert check() == (True, [])
    (library,) = (tmp_path / "cache" / "tinymim_fast").iterdir()
    made = library.stat().st_mtime_ns
    assert check() == (True, [])
    assert library.stat().st_mtime_ns == made
    calls = (tmp_path / "calls").read_text().splitlines()
    assert sum("-c" in call.split() for call in calls) == 1 and calls.count("--version") == 2


@pytest.mark.usefixtures("forgotten")
def test_processes_that_compile_at_once(tmp_path):
    code = "import torch; from tinymim_fast.kernels import cpu; print(cpu.takes(torch.empty(0)))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-c", code]
    running = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=300)[0] for process in running] == ["True\n"] * 2
    assert len(list((tmp_path / "cache" / "tinymim_fast").iterdir())) == 1


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("flags", ["-mno-avx512f", "-mno-avx"], ids=["AVX2", "SSE"])
def test_right_for_every_vector_unit(monkeypatch, flags):
    monkeypatch.setenv("CXX", f"g++ {flags}")
    assert check() == (True, [])


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize(
    ("script", "message"),
    [
        ('echo "no such target" >&2; exit 1', "no such target"),
        ('[ "$1" = --version ] || echo "not code" > "$(echo "$@" | sed "s/.*-o //")"', "file too short"),
        # The gradient of the wrong sign.
        (f"""case "$@" in *{cpu.SOURCE}*) sed 's/b.j. - a.j. . ratio/a[j] * ratio - b[j]/' {cpu.SOURCE} > wrong.cpp
             exec g++ $(echo "$@" | sed "s#{cpu.SOURCE}#wrong.cpp#");; *) exec g++ "$@";; esac""", "something else"),
    ],
    ids=["fails", "writes-nonsense", "miscompiles"],
)  # fmt: skip
def test_a_broken_compiler_is_one_warning(tmp_path, monkeypatch, script, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", compiler(tmp_path / "broken", script))
    available, (warning,) = check()
    assert not available and not (tmp_path / "cache").exists(), "what is wrong is not kept"
    assert message in warning and f"{cpu.SWITCH}=0" in warning and "broken" in warning


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize(("name", "value"), [("PATH", "/nowhere"), (cpu.SWITCH, "0")])
def test_without_a_compiler_nothing_is_said(tmp_path, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert check() == (False, [])
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("forgotten")
def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert check() == (True, [])


@pytest.mark.usefixtures("forgotten")
def test_a_damaged_cache_is_made_anew(tmp_path):
    assert check() == (True, [])
    (library,) = (tmp_path / "cache" / "tinymim_fast").iterdir()
    whole = library.read_bytes()
    library.unlink()  # the one that is loaded stays what it is
    library.write_bytes(b"half a file")
    assert check() == (True, [])
    assert library.stat().st_size == len(whole)


def test_threads_change_nothing():
    tensors = inputs((2, 3, 45, 8, 16))
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(loss_and_grads(relation_kl, *tensors, backend="chunked"))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.parametrize("size", [1e6, 1e15])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_padding_counts_nothing_however_large_the_logits(size, sign):
    """17 tokens are padded to 32: a padded logit must not reach the maximum of the others."""
    x_s, y_s, x_t, y_t = (z.double() for z in inputs((1, 1, 17, 3, 3)))
    kwargs = {"scale_s": sign * size, "scale_t": sign * size}
    ours = loss_and_grads(relation_kl, x_s, y_s, x_t, y_t, backend="chunked", **kwargs)
    exact = loss_and_grads(relation_kl, x_s, y_s, x_t, y_t, backend="reference", **kwargs)
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=0)
