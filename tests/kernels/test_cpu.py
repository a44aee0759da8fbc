"""The compiled loops of backend "chunked": built once, by whole files, or not at all; right for every vector unit."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.relations import inputs, loss_and_grads
from tinymim_fast.kernels import cpu, relation_kl

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.skipif(not cpu.takes(torch.empty(0)), reason="no C++ compiler")
# In a process of its own: whether the loops are there, the largest error against the reference in fp64, warnings.
CHECK = """
import warnings, torch
from support.relations import inputs, loss_and_grads
from tinymim_fast.kernels import cpu, relation_kl
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    errors = []
    for shape in [(2, 3, 197, 16, 32), (1, 2, 5, 3, 7), (1, 2, 33, 130, 24), (2, 2, 1, 1, 1)]:
        for dtype in (torch.float32, torch.float64):
            tensors = inputs(shape, dtype)
            ours = loss_and_grads(relation_kl, *tensors, backend="chunked", reduction="sum")
            exact = loss_and_grads(relation_kl, *(z.double() for z in tensors), backend="reference", reduction="sum")
            scale = max(z.abs().max() for z in exact) * torch.finfo(dtype).eps
            errors += [((a - b).abs().max() / scale).item() for a, b in zip(ours, exact)]
print(cpu.takes(torch.empty(0)), max(errors) < 200)
print(*(str(w.message).replace(chr(10), " ") for w in caught if issubclass(w.category, RuntimeWarning)), sep=chr(10))
"""


def start(tmp_path, **env):
    paths = [str(ROOT), str(ROOT / "tests")]
    env = {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "2",
        **env,
        "PYTHONPATH": os.pathsep.join(paths),
    }
    kept = {name: value for name, value in os.environ.items() if name not in ("CXX", cpu.SWITCH)}
    return subprocess.Popen([sys.executable, "-c", CHECK], env=kept | env, stdout=subprocess.PIPE, text=True)


def check(tmp_path, **env):
    """Whether the loops are there, whether the results are right, and the warnings."""
    output, _ = start(tmp_path, **env).communicate(timeout=300)
    first, *warned = output.splitlines()
    return first, [line for line in warned if line]


def compiler(path, script):
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_compiled_once_and_found_again(tmp_path):
    counting = compiler(tmp_path / "counting", f'echo "$@" >> {tmp_path}/calls; exec g++ "$@"')
    assert check(tmp_path, CXX=counting) == ("True True", [])
    (library,) = (tmp_path / "cache" / "tinymim_fast").iterdir()
    made = library.stat().st_mtime_ns
    assert check(tmp_path, CXX=counting) == ("True True", [])
    assert library.stat().st_mtime_ns == made
    calls = (tmp_path / "calls").read_text().splitlines()
    assert sum("-c" in call.split() for call in calls) == 1 and calls.count("--version") == 2


def test_processes_that_compile_at_once(tmp_path):
    running = [start(tmp_path) for _ in range(3)]
    assert [process.communicate(timeout=300)[0].split() for process in running] == [["True", "True"]] * 3
    assert len(list((tmp_path / "cache" / "tinymim_fast").iterdir())) == 1


@pytest.mark.parametrize("flags", ["-mno-avx512f", "-mno-avx"], ids=["AVX2", "SSE"])
def test_right_for_every_vector_unit(tmp_path, flags):
    assert check(tmp_path, CXX=f"g++ {flags}") == ("True True", [])


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
    right, warned = check(tmp_path, CXX=compiler(tmp_path / "broken", script))
    assert right == "False True"
    (line,) = warned
    assert not (tmp_path / "cache").exists(), "what is wrong is not kept"
    assert message in line and f"{cpu.SWITCH}=0" in line and "broken" in line


def test_without_a_compiler_nothing_is_said(tmp_path):
    assert check(tmp_path, PATH=str(tmp_path)) == ("False True", [])
    assert check(tmp_path, **{cpu.SWITCH: "0"}) == ("False True", [])
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert check(tmp_path) == ("True True", [])


def test_a_damaged_cache_is_made_anew(tmp_path):
    assert check(tmp_path) == ("True True", [])
    (library,) = (tmp_path / "cache" / "tinymim_fast").iterdir()
    whole = library.stat().st_size
    library.write_bytes(b"half a file")
    assert check(tmp_path) == ("True True", [])
    assert library.stat().st_size == whole


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
