"""The runner of all parts, with parts that pass, fail, hang and can't run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import parts as running
import run_all

ROOT = Path(__file__).parent.parent.parent
FOUND = {
    "cuda": False,
    "no_cuda_because": "no CUDA device",
    "cpu": "a CPU",
    "date": "2026-01-02",
    "commit": "abc",
    "sources_sha256": "1",
}
# Ignores the request to stop and has a worker; both write their process ids.
HANGS = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
pid = os.fork()
pathlib.Path(sys.argv[1], "worker" if pid == 0 else "leader").write_text(str(os.getpid()))
time.sleep(60)
"""
# Ends, its worker does not.
LEAVES = """
import os, pathlib, sys, time
if os.fork() == 0:
    pathlib.Path(sys.argv[1], "left").write_text(str(os.getpid()))
    time.sleep(60)
while not pathlib.Path(sys.argv[1], "left").exists():
    time.sleep(0.01)
"""


def part(name, code, *arguments, **options):
    return run_all.Part(name, [sys.executable, "-c", code, *map(str, arguments)], **options)


def is_running(pid):
    """Not gone, and no zombie that waits for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(running, "MIN_PART_S", 0.1)
    monkeypatch.setattr(running, "GRACE_S", 0.3)


def test_each_part_has_its_own_fate(tmp_path, capsys):
    out = tmp_path / "results" / "today"
    out.mkdir(parents=True)
    (out / "file").write_text("of an earlier run")
    parts = [
        part("fails", "print('why it failed'); raise SystemExit(3)"),
        part("crashes", "import os; os.abort()"),
        part("hangs", HANGS, tmp_path, limit_s=1.5, is_test=True),
        part("leaves", LEAVES, tmp_path),
        part("needs_gpu", "", needs=["cuda"]),
        part("needs_package", "", needs=["module:no_such_package.part"]),
        part("needs_program", "", needs=["program:no-such-program"]),
        part("needs_file", "", needs=["benchmarks/no_such_file.py"]),
        part("needs_result", "", needs=["result:none.csv"]),
        run_all.Part("does_not_start", ["/no/such/program"]),
        part(
            "passes", "import os, tinymim_fast.errors; print(os.environ['TRITON_INTERPRET'])", figure=run_all.last_line
        ),
        part("writes", "import sys; open(sys.argv[1], 'x').write(sys.argv[2])", "{out}/file", "{seconds}", limit_s=20),
    ]
    results, stopped = run_all.run(parts, FOUND, out, 60)
    assert [(r.part, r.state, r.reason) for r in results] == [
        ("fails", "failed", "exit code 3"),
        ("crashes", "failed", "SIGABRT"),
        ("hangs", "failed", "no end after 2 s"),
        ("leaves", "passed", ""),
        ("needs_gpu", "left out", "no CUDA device"),
        ("needs_package", "left out", "no_such_package.part is not installed"),
        ("needs_program", "left out", "no-such-program is neither on the PATH nor in CUDA_HOME"),
        ("needs_file", "left out", "benchmarks/no_such_file.py is not in this checkout"),
        ("needs_result", "left out", "there is no none.csv"),
        ("does_not_start", "failed", "does not start: [Errno 2] No such file or directory: '/no/such/program'"),
        ("passes", "passed", ""),
        ("writes", "passed", ""),
    ]
    assert stopped == 0 and results[10].figure == "0" and (out / "file").read_text() == "15"
    assert not any(is_running((tmp_path / name).read_text()) for name in ("leader", "worker", "left"))
    assert "why it failed" in capsys.readouterr().out and "why it failed" in (out / "log.txt").read_text()
    summary = json.loads((out / "summary.json").read_text())
    assert summary["device"] == "a CPU" and [p["state"] for p in summary["parts"]] == [r.state for r in results]
    assert json.loads((out / "environment.json").read_text()) == FOUND
    lines = run_all.table(results).splitlines()
    assert len(lines) == 13 and lines[1].split(maxsplit=3) == ["fails", "failed", lines[1].split()[2], "exit code 3"]


def test_time_runs_out(tmp_path):
    parts = [
        part("benchmark", "import time; time.sleep(60)", limit_s=100),
        part("test", "", is_test=True),
    ]
    results, _ = run_all.run(parts, FOUND, tmp_path, 0.5)
    assert [(r.state, r.reason) for r in results] == [
        ("left out", "cut off when the time was used up"),
        ("left out", "no time left"),
    ]
    results, _ = run_all.run([part("test", "import time; time.sleep(60)", is_test=True)], FOUND, tmp_path, 0.5)
    assert results[0].state == "failed"  # a test that does not end proves nothing


def test_a_second_run_of_the_same_code_continues(tmp_path):
    def states():
        parts = json.loads((tmp_path / "summary.json").read_text())["parts"]
        return {part["part"]: part["state"] for part in parts}

    run_all.run([part("a", ""), part("b", "raise SystemExit(1)"), part("c", "", needs=["cuda"])], FOUND, tmp_path, 60)
    assert states() == {"a": "passed", "b": "failed", "c": "left out"}
    run_all.run([part("a", "", needs=["cuda"]), part("b", "")], FOUND, tmp_path, 60)
    assert states() == {"a": "passed", "b": "passed", "c": "left out"}
    run_all.run([part("a", "", needs=["cuda"])], {**FOUND, "sources_sha256": "2"}, tmp_path, 60)
    assert states() == {"a": "left out"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_the_summary(number, tmp_path):
    code = f"""
import signal, sys
from pathlib import Path
import parts as running
import run_all
running.GRACE_S = 0.3
part = lambda name, code: run_all.Part(name, [sys.executable, "-c", code])
parts = [part("first", ""), part("second", "import time; print('here', flush=True); time.sleep(60)"), part("third", "")]
results, stopped = run_all.run(parts, {FOUND!r}, Path({str(tmp_path)!r}), 60)
print(run_all.table(results))
sys.exit(128 + stopped)
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and "\nhere" not in _read(tmp_path / "log.txt"):
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert [line.split()[0] for line in output.splitlines()[-3:]] == ["first", "second", "third"]
    parts = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert [(p["state"], p["reason"]) for p in parts] == [
        ("passed", ""),
        ("left out", f"stopped by {signal.Signals(number).name}"),
        ("left out", "stopped before its turn"),
    ]


def _read(path):
    return path.read_text() if path.exists() else ""


def test_a_test_run_must_have_run_tests(tmp_path):
    (tmp_path / "test_nothing.py").write_text("import pytest\ndef test(): pytest.skip('no reason')\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        str(tmp_path),
    ]
    tests = run_all.Part("tests", [*command, "--junit-xml={out}/t.xml"], figure=run_all.of_junit("t.xml"), is_test=True)
    results, _ = run_all.run([tests], FOUND, tmp_path, 60)
    assert (results[0].state, results[0].reason) == ("failed", "no test ran, 1 were skipped")
    (tmp_path / "test_nothing.py").write_text("def test_a(): pass\ndef test_b(): assert 0\n")
    results, _ = run_all.run([tests], FOUND, tmp_path, 60)
    assert (results[0].state, results[0].figure) == ("failed", "1 passed, 1 failed, 0 skipped")


def test_sanitizer_says_that_it_looked(tmp_path):
    refuses = part("memcheck", "print('Device not supported'); raise SystemExit(1)", figure=run_all.of_sanitizer)
    results, _ = run_all.run([refuses], FOUND, tmp_path, 60)
    assert (results[0].state, results[0].reason) == ("left out", "compute-sanitizer: Device not supported")
    assert run_all.of_sanitizer(Path(), "x\n========= ERROR SUMMARY: 0 errors\n") == "0 errors"
    with pytest.raises(run_all.Unproven):
        run_all.of_sanitizer(
            Path(), "========= Error: Target application terminated before first instrumented API call\n"
        )


SCRIPTS = {
    part.name: (script, part.command[i + 1 :])
    for mode in ("gpu", "bench")
    for part in run_all.parts_of(mode, mode == "gpu", "images")
    for i, script in enumerate(part.command)
    if script.endswith(".py")
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_flags_are_those_of_the_program(name):
    script, arguments = SCRIPTS[name]
    if not (ROOT / script).exists():
        pytest.skip(f"{script} is not in this checkout: the part is left out")
    source = (ROOT / script).read_text()
    if "import sweep" in source:
        source += (ROOT / "benchmarks" / "sweep.py").read_text()
    missing = [argument for argument in arguments if argument.startswith("--") and f'"{argument}"' not in source]
    assert not missing, f"{script} knows no {missing}"


def without(tmp_path, *packages):
    """The environment of an installation that lacks some packages."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules.update(dict.fromkeys({packages}))")
    kept = {name: value for name, value in os.environ.items() if name not in ("OUT", "TRITON_INTERPRET")}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # hypothesis has a plugin
        "CUDA_VISIBLE_DEVICES": "",
    }


@pytest.mark.parametrize(
    ("packages", "reason"),
    [
        (["torch", "pytest"], "torch does not import: ModuleNotFoundError"),
        (["deepspeed", "xformers"], "no CUDA device"),
    ],
)
def test_gpu_mode_without_a_gpu(packages, reason, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "run_all.py"), "gpu", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, env=without(tmp_path, *packages), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    parts = json.loads((tmp_path / "out" / "summary.json").read_text())["parts"]
    assert parts[0]["part"] == "kernel_tests" and parts[-1]["part"] == "tuning"
    for found in parts:
        assert found["state"] == "left out" and found["reason"].startswith(reason)
        assert f"{found['part']} " in done.stdout


def test_gpu_tests_are_collected_without_the_training_packages(tmp_path):
    env = without(tmp_path, "deepspeed", "nvidia.dali", "xformers", "jsonargparse", "hypothesis")
    files = ["tests/kernels", "tests/training"]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "tests/kernels/test_triton.py::TestOnGpu::test_graph_capture" in done.stdout
