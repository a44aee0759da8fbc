"""The README's reliability table, from the tests that are marked with the fault they show and from the trial of record.

A test carries its row: `@pytest.mark.fault("what happens to the run", "what comes of it")`. It counts as many tries as
it has parameters, or as its `tries=N` says; tests of one fault are added up. `tests/soak.py` writes results/soak.csv.
"""

import ast
import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Fault:
    """A row of the table.

    Args:
        outcome: what comes of the fault.
        tries: in the tests.
        tests: how many functions show it.
    """

    outcome: str
    tries: int = 0
    tests: int = 0


def faults(tests: Path) -> dict[str, Fault]:
    """What the tests below a folder show, in the order of files and lines; read without importing them.

    Raises:
        ValueError: a mark that isn't two strings, or two outcomes of one fault.
    """
    found: dict[str, Fault] = {}
    for path in sorted(tests.rglob("test_*.py")):
        for test, mark, parametrized in _marks(ast.parse(path.read_text(encoding="utf-8"))):
            texts = [part.value for part in mark.args if isinstance(part, ast.Constant)]
            if len(texts) != 2:
                raise ValueError(f'{path.name}: {test}: want fault("what happens", "what comes of it"), both literal')
            told = {word.arg: ast.literal_eval(word.value) for word in mark.keywords}
            row = found.setdefault(texts[0], Fault(texts[1]))
            if row.outcome != texts[1]:
                raise ValueError(
                    f"{path.name}: {test}: {texts[0]!r} has two outcomes, {row.outcome!r} and {texts[1]!r}"
                )
            row.tries += told.get("tries", parametrized)
            row.tests += 1
    return found


def table(tests: Path, results: Path) -> str:
    """Markdown: fault, outcome, and how often it was tried in the tests and in the trial of record."""
    found, record = faults(tests), _record(results / "soak.csv")
    unknown = record.keys() - found.keys()
    if unknown:
        raise ValueError(f"soak.csv: no test is marked with {sorted(unknown)}")
    lines = ["| what happens | what comes of it | tries in the tests | trial of record |", "|---|---|---|---|"]
    for what, row in found.items():
        lines.append(f"| {what} | {row.outcome} | {row.tries} | {record.get(what, '')} |")
    return "\n".join(lines)


def _marks(tree: ast.Module) -> Iterator[tuple[str, ast.Call, int]]:
    """Name, `pytest.mark.fault(...)` and number of parameters of each test that has one."""
    sizes = {
        target.id: len(node.value.keys if isinstance(node.value, ast.Dict) else node.value.elts)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict | ast.List | ast.Tuple)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        marks = [d for d in function.decorator_list if isinstance(d, ast.Call) and isinstance(d.func, ast.Attribute)]
        tries = 1
        for mark in marks:
            if mark.func.attr == "parametrize":
                tries *= _length(mark.args[1], sizes)
        yield from ((function.name, mark, tries) for mark in marks if mark.func.attr == "fault")


def _length(values: ast.expr, sizes: dict[str, int]) -> int:
    """Of a literal list, or of a list or of the values of a dict that the module names; 1 where it can't be seen."""
    if isinstance(values, ast.List | ast.Tuple):
        return len(values.elts)
    if isinstance(values, ast.Call) and isinstance(values.func, ast.Attribute):
        values = values.func.value
    return sizes.get(values.id, 1) if isinstance(values, ast.Name) else 1


def _record(path: Path) -> dict[str, str]:
    """By fault, what the trial of record gave on the newest commit that it was tried on, in words."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    commit_of = {row["fault"]: row["commit"] for row in rows}
    told = {}
    for fault, commit in commit_of.items():
        parts = [row for row in rows if (row["fault"], row["commit"]) == (fault, commit)]
        met = "; ".join(f"{row['part']}: {row['met']}" if row.get("part") else row["met"] for row in parts)
        tries, failed = (sum(int(row[column]) for row in parts) for column in ("tries", "failed"))
        told[fault] = f"{tries} ({met}), {failed} failed; {parts[-1]['date']}, commit {commit}"
    return told
