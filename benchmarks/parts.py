"""Parts that run one after another, each a process group of its own, within a time; what became of them is whole after
each.

A part that fails or hangs leaves the others running; one that can't run here is left out, with the reason. With Python
alone.
"""

import contextlib
import glob
import importlib.util
import json
import os
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

sys.path.append(str(Path(__file__).parent.parent))  # a checkout needs no installation

from tinymim_fast.files import write_text

ROOT = Path(__file__).parent.parent
MIN_PART_S = 15  # less is not worth starting: importing torch and compiling the first kernel take that long
GRACE_S = 10  # between the request to stop and SIGKILL: pytest writes its report in it


@dataclass(frozen=True)
class Part:
    """One process to run.

    Args:
        name: in the summary.
        command: arguments, patterns of files expanded; {out} is the output folder, {scratch} one that is removed
            afterwards, {seconds} three quarters of the time that the part has, for flags that keep what is begun from
            going on too long.
        needs: what must be there: "cuda", a program as "program:NAME", a module as "module:NAME", the result of another
            part as "result:NAME", else a file in ROOT.
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
    """What became of a part; `figure` is its key figure."""

    part: str
    state: str  # passed | failed | left out
    reason: str
    seconds: float
    figure: str


class Unproven(Exception):
    """A program ended well, but did not do what it was started for: the part failed."""


class CannotRun(Exception):
    """A program found that it can't work on this device: the part is left out, whatever the exit code."""


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
            if not is_installed(name):
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


def is_installed(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def run(parts: Sequence[Part], found: dict, folder: Path, seconds: float) -> tuple[list[Result], int]:
    """Runs the parts in order within `seconds`; their results, and the signal that stopped them or 0."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "environment.json", json.dumps(found, indent=1) + "\n")
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
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tinymim_fast_", ignore_cleanup_errors=True) as scratch:
        fields = {"out": str(folder), "scratch": scratch, "seconds": f"{0.75 * limit_s:.0f}"}
        try:
            code, output = _watched(part.command, folder, fields, lambda: signals or time.monotonic() - start > limit_s)
        except OSError as error:
            return Result(part.name, "failed", f"does not start: {error}", 0, "")
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
    if code is not None and cannot_run:
        state, reason = "left out", cannot_run
    elif code == 0:
        state, reason = "failed" if unproven else "passed", unproven
    elif code is not None:
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


def _watched(
    command: Sequence[str], folder: Path, fields: dict[str, str], is_over: Callable[[], object]
) -> tuple[int | None, str]:
    """Exit code, None where it had to be ended, and what it printed, which log.txt has too."""
    for name in re.findall(r"\{out\}/([\w.]+)", " ".join(command)):
        (folder / name).unlink(missing_ok=True)  # of an earlier run, which would pass for this one's
    arguments = [argument.format(**fields) for argument in command]
    command = [file for a in arguments for file in (sorted(glob.glob(a)) if "*" in a else [a])]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    env = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TRITON_INTERPRET": "0"}
    with (folder / "log.txt").open("ab+") as log:
        log.write(f"\n===== {' '.join(command)}\n".encode())
        log.flush()
        begin = log.tell()
        pipes = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **pipes)
        while process.poll() is None and not is_over():
            time.sleep(0.05)
        code = process.poll()
        _end(process)
        log.seek(begin)
        return code, log.read().decode(errors="replace")


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
    write_text(folder / "summary.json", json.dumps(whole, indent=1) + "\n")


def _device(found: dict) -> str:
    return found.get("gpu") or found["cpu"]


def table(results: list[Result]) -> str:
    """A line for each part."""
    cells = [("part", "state", "seconds", "reason or key figure")]
    for r in results:
        seconds = f"{r.seconds:.0f}" if r.seconds else ""
        cells.append((r.part, r.state, seconds, "; ".join(filter(None, (r.reason, r.figure)))))
    return machine.aligned(cells)
