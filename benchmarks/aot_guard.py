"""Whether the kernels compile to worse machine code than before: the committed aot_report.csv against its predecessor.

python benchmarks/aot_guard.py

Compared are the working tree's figures and those of the last revision, on the first-parent line, that has others. A
deliberate regression is accepted by a line in benchmarks/NOTES.md that the predecessor does not have:

Aot-accept: REASON

Reports of different Triton versions are not compared: what another compiler makes of the same kernels is no regression
of theirs.
"""

import csv
import io
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import machine

ROOT = Path(__file__).parent.parent
REPORT = "benchmarks/results/aot_report.csv"
NOTES = "benchmarks/NOTES.md"
ACCEPT = "Aot-accept:"
PROBLEM = "target", "num_tokens", "head_dim_s", "head_dim_t", "dtype", "use"
TILE = "block_queries", "block_keys", "num_warps"
# The report rounds to 0.1 instructions, 0.001 MUFU and 0.1 us. Beyond that, 0.5 %: some five instructions of the
# thousand in a block, which ptxas moves by when it schedules the same code differently.
# Simulated times move further for the same reason, 2 %: waits begin and end elsewhere.
ROUNDING = {"instructions_per_element": 0.1, "mufu_per_element": 0.001, "issue_us": 0.1, "simulated_us": 0.1}
RELATIVE = {"instructions_per_element": 0.005, "mufu_per_element": 0.005, "issue_us": 0.005, "simulated_us": 0.02}

Row = dict[str, str]


@dataclass(frozen=True)
class Regression:
    """One figure that got worse; `problem` is target, N, D_s x D_t, dtype, use."""

    problem: str
    kernel: str
    figure: str
    before: str
    after: str


class NoPredecessor(Exception):
    """There is nothing to compare with; says why."""


def compare(before: list[Row], after: list[Row]) -> tuple[list[Regression], list[str]]:
    """What got worse, and the rows that vanished though their problem is still reported.

    A kernel's instructions and MUFU an element are compared while its tile is the same: of another tile other elements
    are padding. Across tiles and kernels, issue time and simulated time of the whole problem count. More registers are
    fine while as many warps fit on an SM. A problem that is no longer reported is worse; new rows are fine.
    """
    old, new = _by_kernel(before), _by_kernel(after)
    problems = {problem for problem, _ in new}
    regressions, vanished = [], []
    for (problem, kernel), row in old.items():
        if (problem, kernel) not in new:
            if problem in problems:
                vanished.append(f"{problem} {kernel}")
            elif Regression(problem, "", "rows", "reported", "none") not in regressions:
                regressions.append(Regression(problem, "", "rows", "reported", "none"))
            continue
        now = new[problem, kernel]
        same_tile = all(row[name] == now[name] for name in TILE)
        figures = ["instructions_per_element", "mufu_per_element"] if same_tile else []
        pairs = [(name, row[name], now[name], _tolerance(name, row[name])) for name in figures]
        pairs += [(name, row[name], now[name], 0) for name in ("spill_stores", "spill_loads")]
        regressions += [Regression(problem, kernel, name, a, b) for name, a, b, slack in pairs if _more(a, b, slack)]
        warps = [str(int(r["blocks_per_sm"]) * int(r["num_warps"])) if r["blocks_per_sm"] else "" for r in (row, now)]
        if _more(warps[1], warps[0], 0):
            regressions.append(Regression(problem, kernel, "warps per SM", *warps))
    for problem in dict.fromkeys(problem for problem, _ in old):
        for figure in ("issue_us", "simulated_us"):
            times = [_of_all_launches(rows, problem, figure) for rows in (old, new)]
            if _more(*times, _tolerance(figure, times[0])):
                regressions.append(Regression(problem, "all", figure, *times))
    return regressions, vanished


def made_with(rows: list[Row]) -> str:
    """The Triton version of a report; all before the column was there were made with 3.6.0."""
    return rows[0].get("triton", "3.6.0") if rows else ""


def table(regressions: list[Regression]) -> str:
    """A line for each figure that got worse."""
    cells = [("problem", "kernel", "figure", "before", "after")]
    cells += [(r.problem, r.kernel, r.figure, r.before, r.after) for r in regressions]
    return machine.aligned(cells)


def predecessor(root: Path) -> str:
    """The revision to compare with.

    Raises:
        NoPredecessor: no git, no repository, or history that does not reach back so far.
    """
    try:
        top = _git(root, "rev-parse", "--show-toplevel").strip()
        if Path(top).resolve() != root.resolve():
            raise NoPredecessor(f"no git repository: the one around it begins at {top}")
        changed = _git(root, "status", "--porcelain", "--", REPORT).strip()
        last_change = _git(root, "log", "-1", "--first-parent", "--format=%H", "--", REPORT).strip()
    except OSError as error:
        raise NoPredecessor(f"no git: {error}") from error
    except subprocess.CalledProcessError as error:
        raise NoPredecessor(f"no git repository with a commit: {error.stderr.strip()}") from error
    revision = "HEAD" if changed else f"{last_change}^1"
    try:
        _git(root, "cat-file", "-e", f"{revision}:{REPORT}")
    except subprocess.CalledProcessError as error:
        raise NoPredecessor(f"no {REPORT} in {revision}: the first one, or a shallow clone") from error
    return _git(root, "rev-parse", revision).strip()


def check(root: Path = ROOT) -> tuple[str, list[str]]:
    """The table of what got worse and was not accepted, empty if nothing; and the rows that vanished.

    Raises:
        NoPredecessor: there is nothing to compare with, or another Triton made it.
    """
    revision = predecessor(root)
    before, after = _read(_git(root, "show", f"{revision}:{REPORT}")), _read((root / REPORT).read_text())
    if made_with(before) != made_with(after):
        raise NoPredecessor(
            f"{REPORT} was made with Triton {made_with(before)} in {revision[:12]}, now with {made_with(after)}"
        )
    regressions, vanished = compare(before, after)
    if regressions and not _accepted(root, revision):
        head = f"{REPORT}: worse than in {revision[:12]}"
        way_out = f'If that is meant to be, say why in {NOTES}, in a new line "{ACCEPT} REASON".'
        return f"{head}\n{table(regressions)}\n{way_out}", vanished
    return "", vanished


def _accepted(root: Path, revision: str) -> bool:
    try:
        old = _git(root, "show", f"{revision}:{NOTES}")
    except subprocess.CalledProcessError:
        old = ""
    lines = set((root / NOTES).read_text().splitlines()) - set(old.splitlines())
    return any(line.startswith(ACCEPT) and line.removeprefix(ACCEPT).strip() for line in lines)


def _git(root: Path, *command: str) -> str:
    return subprocess.run(["git", "-C", root, *command], capture_output=True, text=True, check=True).stdout


def _read(text: str) -> list[Row]:
    return list(csv.DictReader(io.StringIO(text)))


def _by_kernel(rows: list[Row]) -> dict[tuple[str, str], Row]:
    def problem(row: Row) -> str:
        figures = {"use": "qk", **row}  # reports without the column were of QK alone
        return "{target} N={num_tokens} {head_dim_s}x{head_dim_t} {dtype} {use}".format(
            **{k: figures[k] for k in PROBLEM}
        )

    return {(problem(row), row["kernel"]): row for row in rows}


def _of_all_launches(rows: dict[tuple[str, str], Row], problem: str, figure: str) -> str:
    """Empty where the target, or an older report, has none."""
    times = [row.get(figure, "") for (p, _), row in rows.items() if p == problem]
    return f"{sum(map(float, times)):.1f}" if times and all(times) else ""


def _tolerance(figure: str, before: str) -> float:
    return ROUNDING[figure] + RELATIVE[figure] * float(before or 0)


def _more(before: str, after: str, slack: float) -> bool:
    """Empty figures are those that a target's tools do not tell."""
    return bool(before and after) and float(after) > float(before) + slack + 1e-9


def main() -> None:
    """Print the difference; exit code 1 where something got worse."""
    try:
        worse, vanished = check()
    except NoPredecessor as error:
        print(f"nothing to compare with: {error}")
        return
    for row in vanished:
        print(f"no longer reported: {row}")
    print(worse or "no figure got worse")
    sys.exit(bool(worse))


if __name__ == "__main__":
    main()
