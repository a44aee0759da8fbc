"""Runs what this machine can prove and measure, one part after another, and says what it left out and why.

python benchmarks/run_all.py gpu      every GPU test, then every benchmark on the GPU, in --minutes
python benchmarks/run_all.py bench    every benchmark that this machine can run

Needs the packages that are installed and no network. A part that fails or hangs leaves the others running. --output
(benchmarks/results/GPU/DATE for gpu on a GPU, else bench-out) gets environment.json, summary.json, which is whole after
each part, log.txt, JUnit XML, the benchmarks' CSV and pictures. Exit code: 0 if nothing failed, 1 if a part did, 128 +
signal if stopped.
"""

import argparse
import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree import ElementTree

import machine
import readme_tables
from parts import ROOT, CannotRun, Part, Unproven, find_program, is_installed, run, table

PACKAGES = [
    *(
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
    ),
    *("deepspeed", "jsonargparse", "xformers", "nvidia-dali-cuda130", "nvidia-dali-cuda120"),
]

PROBE = """
import json, torch
found = {"cuda": torch.cuda.is_available()}
if found["cuda"]:
    gpu = torch.cuda.get_device_properties(0)
    found |= {"gpu": gpu.name, "gpu_memory_mib": gpu.total_memory >> 20, "capability": f"{gpu.major}.{gpu.minor}",
              "num_sms": gpu.multi_processor_count, "torch_cuda": torch.version.cuda or torch.version.hip}
print(json.dumps(found))
"""


def environment() -> dict:
    """What the results were made on and with; "cuda" and the GPU's data are asked of torch in a process of its own."""
    versions = dict.fromkeys(PACKAGES)
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        **_probed(),
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


def _probed() -> dict:
    """What torch says of the GPU, and why there is none."""
    try:
        done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return {"cuda": False, "no_cuda_because": "torch finds no CUDA device within 120 s"}
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1]
        return {"cuda": False, "no_cuda_because": f"torch does not import: {last}"}
    found = json.loads(done.stdout.splitlines()[-1])
    return {**found, "no_cuda_because": "" if found["cuda"] else "no CUDA device"}


def _sources_sha256() -> str:
    """Of all code: tells which commit a result belongs to where the checkout came without git."""
    digest = hashlib.sha256()
    for path in sorted(
        path for room in ("benchmarks", "kernels", "tests", "tinymim_fast") for path in (ROOT / room).rglob("*.py")
    ):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


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
    """Its last summary."""
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
    """What a program says at the end, shortened."""
    return output.strip().splitlines()[-1][:100]


def of_demo(folder: Path, output: str) -> str:
    """The student's accuracy, beside chance."""
    accuracies = re.findall(r"^(?:student, distilled|chance) +([0-9.]+)$", output, re.MULTILINE)
    return "k-NN of the student {} %, chance {} %".format(*accuracies)


def gpu_tests() -> list[Part]:
    """All tests that need a GPU: those of the kernels, then the others."""

    def pytest(name: str, needs: tuple[str, ...], limit_s: float, *arguments: str) -> Part:
        workers = min(8, (os.cpu_count() or 1) // 2)  # mostly the compilation of kernels
        parallel = ["-n", str(workers)] if workers > 1 and is_installed("xdist") else []
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *parallel]
        command += [f"--junit-xml={{out}}/{name}.xml", *arguments]
        needs = ("cuda", "module:pytest", *needs)
        return Part(name, command, needs, limit_s, of_junit(f"{name}.xml"), is_test=True)

    others = ("module:timm", "module:PIL", "module:yaml", "module:safetensors")
    return [
        pytest("kernel_tests", (), 300 if is_installed("xdist") else 420, "tests/kernels"),
        pytest("other_gpu_tests", others, 180, "tests", "--ignore=tests/kernels"),
    ]


def sanitizer(tool: str) -> Part:
    """One of compute-sanitizer's tools over the kernels' cases."""
    cases = "tests/kernels/sanitizer_cases.py"
    # The caching allocator would hide accesses beyond a tensor within its own blocks.
    env = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
    check = [find_program("compute-sanitizer") or "", "--tool", tool, "--error-exitcode", "1"]
    command = [*env, *check, sys.executable, cases]
    return Part(tool, command, ("cuda", "program:compute-sanitizer", cases), 120, of_sanitizer, is_test=True)


def benchmark(script: str, *arguments: str, name: str = "", needs: Sequence[str] = (), **options) -> Part:
    """A program of this folder."""
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
        return benchmark(script, *flags, *arguments, name=name, needs=needs, **{"figure": of_results(file), **options})

    images = ["--data-path", data_path] if data_path else []
    presets = timed("relation_loss", "--preset", "B", "S", "T", limit_s=150 * patience)
    sweeps = ["--preset", "B", "--sweep", "tokens", "batch", "head-dim", "dtype", "layout"]
    rest = [
        benchmark("tune_tiles", "--crossover", name="crossover", needs=["cuda"], figure=last_line),
        timed("relation_loss", *sweeps, name="relation_loss_sweeps", limit_s=180 * patience),
        timed("relation_loss", "--preset", "lightly", "--sweep", "presets", "head-dim", name="relation_loss_wide"),
        timed("attention", needs=[*needs, "module:timm"], limit_s=150 * patience, figure=last_line),
        timed(
            "train_step",
            *("--sweep", "pairs", "settings"),
            needs=[*needs, "module:timm", "module:deepspeed", "module:jsonargparse"],
            limit_s=180 * patience,
        ),
        timed(
            "data_loading",
            *images,
            needs=[*needs, "module:nvidia.dali", "module:torchvision"],
            limit_s=180 * patience,
            figure=last_line,
        ),
        timed("throughput", needs=[*needs, "module:timm"], limit_s=100 * patience, figure=last_line),
        benchmark(
            "plot",
            *("{out}/*.csv", "--output-dir", "{out}"),
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
    # How far the simulated times of NOTES.md are off is known before anything is made of them.
    simulation = benchmark("latency_check", needs=["cuda"], limit_s=120, figure=last_line)
    return [*gpu_tests(), simulation, presets, sanitizer("memcheck"), sanitizer("racecheck"), *rest, demo, tuning]


def default_folder(mode: str, found: dict) -> Path:
    """Results of a GPU have a committed place, others do not."""
    if mode == "bench" or not found["cuda"]:
        return ROOT / "bench-out"
    gpu = re.sub(r"[^a-z0-9]+", "-", found["gpu"].lower()).strip("-")
    return ROOT / "benchmarks" / "results" / gpu / found["date"]


def parse_args() -> argparse.Namespace:
    """Flags."""
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
    """Run the parts, print their table, exit with the code of the head of this file."""
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
