"""Runs what this machine can prove and measure, one part after another, and says what it left out and why.

python benchmarks/run_all.py gpu      every GPU test, then every benchmark on the GPU, in --minutes
python benchmarks/run_all.py bench    every benchmark that this machine can run

Needs the packages that are installed and no network. A part that fails or hangs leaves the others running. --output
(benchmarks/results/GPU/DATE for gpu on a GPU, else bench-out) gets environment.json, summary.json, which is whole after each part,
log.txt, JUnit XML, the benchmarks' CSV and pictures. Exit code: 0 if nothing failed, 1 if a part did, 128 + signal if stopped.
"""

import argparse
import contextlib
import datetime
import glob
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree

import machine
import readme_tables

ROOT = Path(__file__).parent.parent
PACKAGES = [
    "torch",
    "triton",
    "numpy",
    "timm",
    "torchvision",
    "pillow",
    "matplotlib",
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "deepspeed",
    "jsonargparse",
    "xformers",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
]
MIN_PART_S = 15  # less is not worth starting: importing torch and compiling the first kernel take that long
GRACE_S = 10  # between the request to stop and SIGKILL: pytest writes its report in it
PROBE = """
import json, torch
found = {"cuda": torch.cuda.is_available()}
if found["cuda"]:
    gpu = torch.cuda.get_device_properties(0)
    found |= {"gpu": gpu.name, "gpu_memory_mib": gpu.total_memory >> 20, "capability": f"{gpu.major}.{gpu.minor}",
              "num_sms": gpu.multi_processor_count, "torch_cuda": torch.version.cuda or torch.version.hip}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Part:
    """One process to run.

    Args:
        name: in the summary.
        command: arguments, patterns of files expanded; {out} is the output folder, {scratch} one that is removed afterwards, {seconds} three
            quarters of the time that the part has, for flags that keep what is begun from going on too long.
        needs: what must be there: "cuda", a program as "program:NAME", a module as "module:NAME", the result of another part
            as "result:NAME", else a file in ROOT.
        limit_s: seconds after which it is stopped.
        figure: the key figure, from the output folder and what the part printed.
        is_test: running out of time is a failure; a benchmark keeps the rows that it has.
    """

    name: str
    command: Sequence[str]
    needs: Sequence[str] = ()
    limit_s: float = 120
    figure: Callable[[Path, str], str] = lambda folder, output: ""
    is_test: bool = False


@dataclass(frozen=True)
class Result:
    part: str
    state: str  # passed | failed | left out
    reason: str
    seconds: float
    figure: str


class Unproven(Exception):
    """A program ended well, but did not do what it was started for: the part failed."""


class CannotRun(Exception):
    """A program found that it can't work on this device: the part is left out, whatever the exit code."""


def environment() -> dict:
    """What the results were made on and with; "cuda" and the GPU's data are asked of torch in a process of its own."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    probed: dict = {"cuda": False}
    try:
        done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=120, check=False)
        if done.returncode == 0:
            probed = json.loads(done.stdout.splitlines()[-1])
            reason = "" if probed["cuda"] else "no CUDA device"
        else:
            reason = f"torch does not import: {done.stderr.strip().splitlines()[-1]}"
    except subprocess.TimeoutExpired:
        reason = "torch finds no CUDA device within 120 s"
    return {
        **probed,
        "no_cuda_because": reason,
        "driver": machine.driver(),
        "cpu": machine.cpu_name(),
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
        "commit": machine.commit(),
        "sources_sha256": _sources_sha256(),
    }


def _sources_sha256() -> str:
    """Of all code: tells which commit a result belongs to where the checkout came without git."""
    digest = hashlib.sha256()
    for path in sorted(
        path for room in ("benchmarks", "kernels", "tests", "tinymim_fast") for path in (ROOT / room).rglob("*.py")
    ):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def find_program(name: str) -> str | None:
    """On the PATH, or in CUDA's own folder, which is often not on it."""
    homes = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", ""), "/usr/local/cuda"]
    folders = [f"{home}/{folder}" for home in homes if home for folder in ("bin", "compute-sanitizer")]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def missing(part: Part, found: dict, folder: Path) -> str:
    """Why the part can't run here; empty if it can."""
    for need in part.needs:
        kind, _, name = need.rpartition(":")
        if need == "cuda":
            if not found["cuda"]:
                return found["no_cuda_because"]
        elif kind == "module":
            if not _is_installed(name):
                return f"{name} is not installed"
        elif kind == "program":
            if find_program(name) is None:
                return f"{name} is neither on the PATH nor in CUDA_HOME"
        elif kind == "result":
            if not (folder / name).exists():
                return f"there is no {name}"
        elif not (ROOT / need).exists():
            return f"{need} is not in this checkout"
    return ""


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def run(parts: Sequence[Part], found: dict, folder: Path, seconds: float) -> tuple[list[Result], int]:
    """Runs the parts in order within `seconds`; their results, and the signal that stopped them or 0."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "environment.json").write_text(json.dumps(found, indent=1) + "\n")
    earlier = earlier_parts(folder, found)
    deadline = time.monotonic() + seconds
    results: list[Result] = []
    signals: list[int] = []
    handlers = {
        s: signal.signal(s, lambda number, frame: signals.append(number)) for s in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        for number, part in enumerate(parts, start=1):
            left = deadline - time.monotonic()
            if signals:
                result = Result(part.name, "left out", "stopped before its turn", 0, "")
            elif reason := missing(part, found, folder):
                result = Result(part.name, "left out", reason, 0, "")
            elif left < MIN_PART_S:
                result = Result(part.name, "left out", "no time left", 0, "")
            else:
                print(f"[{number}/{len(parts)}] {part.name}, {min(part.limit_s, left):.0f} s at most", flush=True)
                result = run_part(part, folder, left, signals)
                print(f"    {result.state} in {result.seconds:.0f} s  {result.reason or result.figure}", flush=True)
            results.append(result)
            write_summary(folder, results, found, earlier)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return results, signals[0] if signals else 0


def run_part(part: Part, folder: Path, left_s: float, signals: Sequence[int]) -> Result:
    """One part in a process group of its own, of which nothing is left afterwards."""
    limit_s = min(part.limit_s, left_s)
    scratch = tempfile.TemporaryDirectory(prefix="tinymim_fast_", ignore_cleanup_errors=True)
    fields = {"out": str(folder), "scratch": scratch.name, "seconds": f"{0.75 * limit_s:.0f}"}
    for name in re.findall(r"\{out\}/([\w.]+)", " ".join(part.command)):
        (folder / name).unlink(missing_ok=True)  # of an earlier run, which would pass for this one's
    arguments = [argument.format(**fields) for argument in part.command]
    command = [
        file for argument in arguments for file in (sorted(glob.glob(argument)) if "*" in argument else [argument])
    ]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    env = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TRITON_INTERPRET": "0"}
    start = time.monotonic()
    with scratch, (folder / "log.txt").open("ab+") as log:
        log.write(f"\n===== {part.name}: {' '.join(command)}\n".encode())
        log.flush()
        begin = log.tell()
        pipes = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        try:
            process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **pipes)
        except OSError as error:
            return Result(part.name, "failed", f"does not start: {error}", 0, "")
        while process.poll() is None and not signals and time.monotonic() - start < limit_s:
            time.sleep(0.05)
        ended = process.poll() is not None
        _end(process)
        log.seek(begin)
        output = log.read().decode(errors="replace")
    seconds = round(time.monotonic() - start, 1)

    figure = unproven = cannot_run = ""
    try:
        figure = part.figure(folder, output)
    except CannotRun as error:
        cannot_run = str(error)
    except Unproven as error:
        unproven = str(error)
    except (OSError, KeyError, ValueError, IndexError, ElementTree.ParseError) as error:
        unproven = f"no key figure: {type(error).__name__}: {error}"
    if ended and cannot_run:
        state, reason = "left out", cannot_run
    elif ended and process.returncode == 0:
        state, reason = "failed" if unproven else "passed", unproven
    elif ended:
        code = process.returncode
        state, reason = "failed", f"exit code {code}" if code > 0 else signal.Signals(-code).name
    elif signals:
        state, reason = "left out", f"stopped by {signal.Signals(signals[0]).name}"
    elif left_s < part.limit_s and not part.is_test:
        state, reason = "left out", "cut off when the time was used up"
    else:
        state, reason = "failed", f"no end after {limit_s:.0f} s"
    if state == "failed" or not part.is_test:
        print("".join(f"    | {line}\n" for line in output.splitlines()[-40:]), end="")
    return Result(part.name, state, reason, seconds, figure)


def _end(process: subprocess.Popen) -> None:
    """Asks the group to stop, then kills what is left of it, workers that outlived their parent too."""
    for number in (signal.SIGINT, signal.SIGKILL):
        if process.poll() is None or number == signal.SIGKILL:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            # After SIGKILL: a process stuck in the driver is left to it.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=GRACE_S)


def earlier_parts(folder: Path, found: dict) -> dict[str, dict]:
    """Parts of the summary that an earlier run of the same code left in the folder."""
    path = folder / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() else {}
    same = summary.get("sources_sha256") == found["sources_sha256"] and summary["device"] == _device(found)
    return {part["part"]: part for part in summary["parts"]} if same else {}


def write_summary(folder: Path, results: list[Result], found: dict, earlier: dict[str, dict]) -> None:
    """What was left out this time stands as it did earlier."""
    parts = {**earlier, **{r.part: asdict(r) for r in results if r.state != "left out" or r.part not in earlier}}
    whole = {
        "device": _device(found),
        "date": found["date"],
        "commit": found["commit"],
        "sources_sha256": found["sources_sha256"],
        "parts": list(parts.values()),
    }
    unfinished = folder / "summary.json.tmp"
    unfinished.write_text(json.dumps(whole, indent=1) + "\n")
    unfinished.replace(folder / "summary.json")


def _device(found: dict) -> str:
    return found.get("gpu") or found["cpu"]


def table(results: list[Result]) -> str:
    cells = [("part", "state", "seconds", "reason or key figure")]
    cells += [
        (r.part, r.state, f"{r.seconds:.0f}" if r.seconds else "", "; ".join(filter(None, (r.reason, r.figure))))
        for r in results
    ]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells)


def of_junit(name: str) -> Callable[[Path, str], str]:
    """Counts of a JUnit file."""

    def figure(folder: Path, output: str) -> str:
        suites = list(ElementTree.parse(folder / name).getroot().iter("testsuite"))
        tests, failed, skipped = (
            sum(int(suite.get(key, 0)) for suite in suites for key in keys)
            for keys in (("tests",), ("failures", "errors"), ("skipped",))
        )
        passed = tests - failed - skipped
        if not passed and not failed:
            raise Unproven(f"no test ran, {skipped} were skipped")
        return f"{passed} passed, {failed} failed, {skipped} skipped"

    return figure


def of_sanitizer(folder: Path, output: str) -> str:
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", output)
    if "Device not supported" in output:  # as on virtualised GPUs whose driver gives no debugger access
        raise CannotRun("compute-sanitizer: Device not supported")
    if not found:
        raise Unproven("compute-sanitizer printed no summary")
    return found[-1]


def of_results(name: str) -> Callable[[Path, str], str]:
    """The headline of a benchmark's CSV."""
    return lambda folder, output: readme_tables.headline(readme_tables.read_rows(folder, name))


def last_line(folder: Path, output: str) -> str:
    return output.strip().splitlines()[-1][:100]


def of_demo(folder: Path, output: str) -> str:
    accuracies = re.findall(r"^(?:student, distilled|chance) +([0-9.]+)$", output, re.MULTILINE)
    return "k-NN of the student {} %, chance {} %".format(*accuracies)


def gpu_tests() -> list[Part]:
    def pytest(name: str, needs: tuple[str, ...], limit_s: float, *arguments: str) -> Part:
        workers = min(8, (os.cpu_count() or 1) // 2)  # mostly the compilation of kernels
        parallel = ["-n", str(workers)] if workers > 1 and _is_installed("xdist") else []
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *parallel]
        command += [f"--junit-xml={{out}}/{name}.xml", *arguments]
        needs = ("cuda", "module:pytest", *needs)
        return Part(name, command, needs, limit_s, of_junit(f"{name}.xml"), is_test=True)

    others = ("module:timm", "module:PIL", "module:yaml", "module:safetensors")
    return [
        pytest("kernel_tests", (), 300 if _is_installed("xdist") else 420, "tests/kernels"),
        pytest("other_gpu_tests", others, 180, "tests", "--ignore=tests/kernels"),
    ]


def sanitizer(tool: str) -> Part:
    cases = "tests/kernels/sanitizer_cases.py"
    # The caching allocator would hide accesses beyond a tensor within its own blocks.
    env = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
    command = [
        *env,
        find_program("compute-sanitizer") or "",
        "--tool",
        tool,
        "--error-exitcode",
        "1",
        sys.executable,
        cases,
    ]
    return Part(tool, command, ("cuda", "program:compute-sanitizer", cases), 120, of_sanitizer, is_test=True)


def benchmark(script: str, *arguments: str, name: str = "", needs: Sequence[str] = (), **options) -> Part:
    path = f"benchmarks/{script}.py"
    return Part(name or script, [sys.executable, path, *arguments], (*needs, "module:torch", path), **options)


def parts_of(mode: str, cuda: bool, data_path: str) -> list[Part]:
    """The most important first."""
    device = "cuda" if cuda or mode == "gpu" else "cpu"
    needs = ["cuda"] if device == "cuda" else []
    patience = 1 if mode == "gpu" else 3  # without a budget, and on a CPU

    def timed(script: str, *arguments: str, name: str = "", needs: Sequence[str] = needs, **options) -> Part:
        file = f"{name or script}.csv"
        flags = ["--device", device, "--time-budget", "{seconds}", "--output", f"{{out}}/{file}"]
        return benchmark(script, *flags, *arguments, name=name, needs=needs, figure=of_results(file), **options)

    images = ["--data-path", data_path] if data_path else []
    presets = timed("relation_loss", "--preset", "B", "S", "T", limit_s=150 * patience)
    sweeps = ["--preset", "B", "--sweep", "tokens", "batch", "head-dim", "dtype", "layout"]
    rest = [
        benchmark("tune_tiles", "--crossover", name="crossover", needs=["cuda"], figure=last_line),
        timed("relation_loss", *sweeps, name="relation_loss_sweeps", limit_s=180 * patience),
        timed("train_step", needs=[*needs, "module:timm"], limit_s=180 * patience),
        benchmark(
            "data_loading",
            *images,
            *("--time-budget", "{seconds}", "--output", "{out}/data_loading.csv"),
            needs=[*needs, "module:nvidia.dali", "module:torchvision"],
            limit_s=180 * patience,
            figure=last_line,
        ),
        benchmark(
            "plot",
            *("{out}/relation_loss*.csv", "--output-dir", "{out}"),
            name="pictures",
            needs=[*needs, "module:matplotlib", "result:relation_loss.csv"],
            limit_s=60,
        ),
    ]
    if mode == "bench":
        return [presets, *rest, benchmark("aot_report", "--output", "{out}/aot_report.csv", limit_s=600)]
    demo = Part(
        "demo",
        [sys.executable, "-m", "tinymim_fast.demo", "--output-dir", "{scratch}/demo"],
        ("cuda", *(f"module:{name}" for name in ("deepspeed", "jsonargparse", "timm", "PIL", "torchvision"))),
        limit_s=300,
        figure=of_demo,
        is_test=True,
    )
    tuning = benchmark("tune_tiles", name="tuning", needs=["cuda"], limit_s=600, figure=last_line)
    return [*gpu_tests(), presets, sanitizer("memcheck"), sanitizer("racecheck"), *rest, demo, tuning]


def default_folder(mode: str, found: dict) -> Path:
    if mode == "bench" or not found["cuda"]:
        return ROOT / "bench-out"
    gpu = re.sub(r"[^a-z0-9]+", "-", found["gpu"].lower()).strip("-")
    return ROOT / "benchmarks" / "results" / gpu / found["date"]


def parse_args() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("mode", choices=["gpu", "bench"])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="for everything; no limit if not given")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="of the summary; all if not given")
    parser.add_argument(
        "--output", type=Path, help="folder of the results; what it has of the same code stays in the summary"
    )
    parser.add_argument("--data-path", default="", help="image folder for data_loading, which draws one if not given")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    found = environment()
    folder = (args.output or default_folder(args.mode, found)).resolve()
    print(f"{found.get('gpu') or found['no_cuda_because']}; results go to {os.path.relpath(folder)}", flush=True)
    parts = {part.name: part for part in parts_of(args.mode, found["cuda"], args.data_path)}
    if unknown := set(args.parts or []) - parts.keys():
        sys.exit(f"--parts: got {' '.join(sorted(unknown))}, want any of {' '.join(parts)}")
    wanted = [parts[name] for name in parts if name in (args.parts or parts)]
    results, stopped = run(wanted, found, folder, 60 * args.minutes)
    print(f"\n{table(results)}\n\nwritten to {os.path.relpath(folder)}")
    sys.exit(128 + stopped if stopped else any(result.state == "failed" for result in results))


if __name__ == "__main__":
    main()
