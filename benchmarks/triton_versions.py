"""Whether the kernels compile, and pass in the interpreter, under other versions of Triton.

python benchmarks/triton_versions.py 3.5.1 3.6.0 3.9.0

Each version is installed alone, without dependencies, into a temporary folder that Python finds before its own: torch
and the rest stay. The kernels of `SHAPES` are compiled for `--target`, and the tests of `--tests` run in that Triton's
interpreter. Prints a table, a line a version; a version that aborts says so. Minutes each; not part of the tests.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
# (N, D_s, D_t, dtype, use): both kernels, what fills the registers, fp32, lengths and row weights.
SHAPES = [
    *((197, d_s, 64, "bfloat16", "qk") for d_s in (16, 32, 64)),
    (50, 32, 64, "bfloat16", "qk"),
    (197, 64, 64, "float16", "qk+vv"),
    (197, 64, 64, "float16", "rows"),
    (577, 128, 128, "bfloat16", "qk"),
    (197, 64, 64, "float32", "qk"),
]
TESTS = "lengths or packed_relations or strides or logits_of or maximum or rescale or why_it"
COMPILE = """
import sys
sys.path.insert(0, "benchmarks")
import aot_report
from triton_versions import SHAPES
rows = [row for shape in SHAPES for row in aot_report.rows_of(sys.argv[1], shape)]
issue_us = sum(float(row.issue_us or 0) for row in rows)
spilling = sum(bool(row.spill_stores or row.spill_loads) for row in rows)
print(f"{len(rows)} kernels, issue time {issue_us:.0f} us, spills in {spilling}")
"""


def outcome(command: list[str], env: dict[str, str]) -> str:
    """The last line of the output; with what went wrong if the command failed."""
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    lines = [line for line in (done.stdout.strip() or done.stderr.strip()).splitlines() if line.strip()]
    last = lines[-1].strip("= ") if lines else "no output"
    if done.returncode < 0:
        return f"dies of signal {-done.returncode}"
    failed = (done.stderr.strip().splitlines() or [last])[-1] if done.returncode else ""
    return last if not failed else f"fails: {failed if 'passed' not in last else last}"[:160]


def row_of(version: str, args: argparse.Namespace, folder: Path) -> tuple[str, str, str]:
    """What happens under one version of Triton."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, f"triton=={version}"]
    subprocess.run(install, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (folder, ROOT)))
    env["TRITON_CACHE_DIR"] = str(folder / "cache")
    compiled = outcome([sys.executable, "-c", COMPILE, args.target], env)
    tests = ["tests/kernels/test_triton.py", "tests/kernels/test_backward.py", "-k", args.tests]
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", *tests]
    return version, compiled, outcome(pytest, {**env, "TRITON_INTERPRET": "1"})


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+", help="as pip knows them")
    parser.add_argument("--target", default="sm_90", help="one of aot_report.py's")
    parser.add_argument("--tests", default=TESTS, help="pytest's -k")
    args = parser.parse_args()
    print(f"| Triton | compiled for {args.target} | interpreter |\n|---|---|---|", flush=True)
    for version in args.versions:
        with tempfile.TemporaryDirectory(prefix="tmp_triton_") as folder:
            print("| " + " | ".join(row_of(version, args, Path(folder))) + " |", flush=True)


if __name__ == "__main__":
    main()
