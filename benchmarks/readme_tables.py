"""The README's performance, study, proof and reliability sections, from benchmarks/results and the marks on tests.

python benchmarks/readme_tables.py        rewrites README.md (make readme-tables)

Every CSV below that folder is read; of each device and benchmark, the newest date counts. What a note.txt beside a CSV
says of how it was measured stands with its table. Needs Python alone.
"""

import csv
import json
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import reliability
import study_report
from labels import OURS, in_order, label, our_row

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# What is proven, how on a CPU (CI), and the parts of run_all.py that must have passed on a GPU.
PROOFS = [
    (
        "relation loss, `chunked`, against fp64",
        "tested, all listed shapes and dtypes, `reference` too",
        ["relation_loss"],
    ),
    (
        'fused Triton kernels (`backend="triton"`)',
        "tested in Triton's interpreter, fp32 and fp16; compiled for sm_80, 89, 90, 100 and gfx942",
        ["kernel_tests"],
    ),
    ("their memory accesses and races (compute-sanitizer)", "not applicable", ["memcheck", "racecheck"]),
    ("DALI views against PIL and torchvision", "tested (CPU decoding)", ["other_gpu_tests"]),
    ("damaged files replaced in training, tar shards", "tested, one and two processes", ["other_gpu_tests"]),
    ("a training step in bf16 on random images", "tested", ["train_step"]),
    (
        "CUDA graphs: the teacher's (`--cuda-graphs true`), a user's around the loss",
        "tested by a stand-in for graphs; no operator that a graph can't hold",
        ["kernel_tests", "other_gpu_tests"],
    ),
    ("attention kernels beside SDPA's choice (`--attention`)", "tested: `sdpa`, `flash`, `math`", ["attention"]),
    ("pre-training, distillation with DeepSpeed, export, k-NN (`make demo`)", "tested", ["demo"]),
    ("ZeRO 0 to 3, exact resume, also on other numbers of ranks", "tested, one to three processes", []),
]
Row = dict[str, str]


def read_rows(folder: Path, name: str = "*.csv") -> list[Row]:
    """Of every CSV of that name below a folder that has the columns which the benchmarks share, and the file."""
    rows = []
    for path in sorted(folder.rglob(name)):
        with path.open(newline="") as file:
            rows += [
                {**row, "file": str(path)} for row in csv.DictReader(file) if {"benchmark", "status"} <= row.keys()
            ]
    return rows


def newest(rows: Iterable[Row], benchmark: str, **where: str) -> dict[str, list[Row]]:
    """Rows of one benchmark by device in whose columns these values stand, of the last date on which it ran there."""
    by_device: dict[str, list[Row]] = {}
    for row in rows:
        if row["benchmark"] == benchmark and all(row[name] == value for name, value in where.items()):
            by_device.setdefault(row["device"], []).append(row)
    return {
        device: [row for row in found if row["date"] == max(row["date"] for row in found)]
        for device, found in by_device.items()
    }


def by_provider(rows: Iterable[Row], **where: str) -> dict[str, Row]:
    """The first row of each provider in whose columns these values stand."""
    found: dict[str, Row] = {}
    for row in rows:
        if all(row[name] == value for name, value in where.items()):
            found.setdefault(row["provider"], row)
    return found


def point_of(row: Row) -> Row:
    """The columns before the provider: what was measured."""
    names = list(row)
    return {name: row[name] for name in names[: names.index("provider")]}


def headline(rows: list[Row]) -> str:
    """The key figure of one file's rows: the first point, which is the most important, in one line.

    Raises:
        ValueError: nothing of ours was timed there.
    """
    providers = by_provider(rows, **point_of(rows[0])) if rows else {}
    ours = our_row(providers.values())
    if ours is None:
        raise ValueError(f"no time of {' or '.join(OURS)} in the first rows")
    peers = [f"{row['provider']} {_ratio(row, ours)}" for row in providers.values() if row is not ours]
    point = f"{ours['pair']} {ours['precision']}" if "pair" in ours else f"ViT-{ours['preset']} {ours['mode']}"
    rate = f", {_number(ours['images_per_s'])} images/s" if "images_per_s" in ours else ""
    return ", ".join([f"{point}: {ours['provider']} {_number(ours['step_ms'])} ms{rate}", *peers])


def _number(text: str) -> str:
    """Three significant digits, no exponent."""
    value = float(text)
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def _ratio(row: Row, ours: Row) -> str:
    """How many times our time a provider takes."""
    return f"{float(row['step_ms']) / float(ours['step_ms']):.2f}x" if row["step_ms"] else row["status"]


def performance(results: Path) -> str:
    """A section for each device and benchmark, GPUs first, and the picture of the first device that has one."""
    rows = read_rows(results)
    paper = [row for row in rows if row.get("preset") in ("B", "S", "T")]
    losses = newest(paper, "relation_loss", sweep="presets", mode="forward_backward")
    # Rows without a precision are of a look-alike of the step that the loop no longer runs.
    steps = newest((row for row in rows if "precision" in row), "train_step", sweep="pairs")
    loading = newest(rows, "data_loading", sweep="views")
    inference = newest(rows, "throughput", sweep="runtimes")
    sections = {device: [(loss_section, of_device)] for device, of_device in losses.items()}
    for section, by_device in (
        (step_section, steps),
        (loading_section, loading),
        (throughput_section, inference),
    ):
        for device, of_device in by_device.items():
            sections.setdefault(device, []).append((section, of_device))
    devices = sorted(sections, key=lambda device: (sections[device][0][1][0]["device_type"] != "cuda", device))
    parts = [section(of_device) for device in devices for section, of_device in sections[device]]
    for device in (device for device in devices if device in losses):
        for picture in sorted(Path(losses[device][0]["file"]).parent.glob("*tokens_time.png")):
            name = f"Time against the number of tokens, {device}"
            parts.append(f"![{name}](benchmarks/results/{picture.relative_to(results).as_posix()})")
            return "\n\n".join(parts)
    return "\n\n".join(parts) or "Not measured yet."


def loss_section(rows: list[Row]) -> str:
    """A table with a line for each provider, and the sentence that says what was measured."""
    presets = list(dict.fromkeys(row["preset"] for row in rows))
    columns = [(f"ViT-{name}", by_provider(rows, preset=name), "ms") for name in presets]
    first = rows[0]
    columns.append((f"extra MiB, ViT-{presets[0]}", columns[0][1], "MiB"))
    relations = first["relations"].upper().replace("+", " + ")
    batches = " and ".join(dict.fromkeys(row["batch_size"] for row in rows))
    how = (
        f"**{_machine(first)}**: milliseconds for {relations} and the student's gradient, from packed projections, "
        f"{first['dtype']}, batch {batches}, N = {first['num_tokens']}, and how many times our time that is. Medians "
        f"of interleaved repeats; each provider is first held against fp64. {_made(first, 'relation_loss')}"
    )
    return _paragraph_and_table(how, _table(columns))


def step_section(rows: list[Row]) -> str:
    """Images/s of whole steps, and what our step is made of."""
    first = rows[0]
    points = list(dict.fromkeys((row["pair"], row["precision"]) for row in rows))
    columns = [
        (f"{pair}, {precision}", by_provider(rows, pair=pair, precision=precision), "images/s")
        for pair, precision in points
    ]
    of_ours = our_row(columns[0][1].values())
    parts = ""
    if of_ours:
        times = {name: float(of_ours[f"{name}_ms"]) for name in ("teacher", "forward", "backward", "optimizer")}
        shares = ", ".join(f"{name} {ms / sum(times.values()):.0%}" for name, ms in times.items())
        parts = f" Our step, {columns[0][0]}: {shares}; the loss alone {float(of_ours['loss_ms']):.3g} ms."
    how = (
        f"**Steps on {_machine(first)}**: images/s of whole distillation steps on random images, batch "
        f"{first['batch_size']}, models of the recipes, ZeRO {first['zero_stage']}, and how many times our time the "
        f"others take. Medians of interleaved repeats; loss and gradient are first held against fp64.{parts} "
        f"{_made(first, 'train_step')}"
    )
    return _paragraph_and_table(how, _table(columns))


def _machine(row: Row) -> str:
    return row["device"] + (f", {row['num_threads']} threads" if row["device_type"] == "cpu" else "")


def _made(row: Row, program: str) -> str:
    note = Path(row["file"]).with_name("note.txt")
    said = f" {' '.join(note.read_text().split())}" if note.exists() else ""
    return f"{row['date']}, commit {row['commit']}, torch {row['torch']}: `python benchmarks/{program}.py`.{said}"


def _table(columns: list[tuple[str, dict[str, Row], str]]) -> list[list[str]]:
    """A line for each provider; columns as title, rows by provider and unit."""
    names = in_order(provider for _, rows, _ in columns for provider in rows)
    cells = [[label(name).name, *(_cell(name, rows, unit) for _, rows, unit in columns)] for name in names]
    return [["", *(title for title, _, _ in columns)], *cells]


def loading_section(rows: list[Row]) -> str:
    """Images/s of the loaders, and how many times what a user's torchvision gives."""
    first = rows[0]
    views = list(dict.fromkeys(row["views"] for row in rows))
    table = [["", *(f"images/s, {n} view{'s' * (n != '1')}" for n in views), f"CPU ms / image, {views[0]} views"]]
    columns = [by_provider(rows, views=n) for n in views]
    for provider in dict.fromkeys(row["provider"] for row in rows):
        cells = []
        for column in columns:
            row, user = column.get(provider), column.get("torchvision", {})
            if row is None or not row["images_per_s"]:
                cells.append(row["status"] if row else "")
                continue
            rate, users = row["images_per_s"], user.get("images_per_s")
            cells.append(_number(rate) + (f" ({float(rate) / float(users):.2f}x)" if users and row is not user else ""))
        cpu = columns[0].get(provider, {}).get("cpu_ms_per_image", "")
        table.append([label(provider).name, *cells, _number(cpu) if cpu else ""])
    how = (
        f"**Loading on {first['device']}, {first['num_workers']} workers**: from JPEGs of "
        f"{float(first['kib_per_image']):.0f} KiB to normalised 224-pixel views, batch {first['batch_size']}, in the "
        "page cache, and how many times what torchvision gives as its users write it. Medians of interleaved repeats; "
        f"our views are first held against PIL's. {first['date']}, commit {first['commit']}: "
        "`python benchmarks/data_loading.py`."
    )
    return _paragraph_and_table(how, table)


def throughput_section(rows: list[Row]) -> str:
    """Images/s of models in inference, and how many times the largest's."""
    first, ways = rows[0], list(dict.fromkeys((row["runtime"], row["precision"], row["batch_size"]) for row in rows))
    columns = [
        by_provider(rows, runtime=runtime, precision=precision, batch_size=size) for runtime, precision, size in ways
    ]
    names = {"pytorch": "PyTorch", "onnxruntime": "ONNX"}
    table = [["", "million weights", *(f"{names[r]} {p}, batch {size}" for r, p, size in ways)]]
    for provider in dict.fromkeys(row["provider"] for row in rows):
        cells = []
        for column in columns:
            row, largest = column.get(provider, {}), next(iter(column.values()))
            rate = row.get("images_per_s")
            ratio = "" if row is largest or not rate else f" ({float(rate) / float(largest['images_per_s']):.1f}x)"
            cells.append(f"{_number(rate)}{ratio}" if rate else row.get("status", ""))
        table.append([f"ViT-{provider}", columns[0].get(provider, {}).get("million_parameters", ""), *cells])
    how = (
        f"**Inference on {_machine(first)}**: images/s of classifiers of 224 pixels and 1,000 classes, and how many "
        "times the largest's. Medians of interleaved repeats; each model is first held against itself in fp64. "
        f"{_made(first, 'throughput')}"
    )
    return _paragraph_and_table(how, table)


def _paragraph_and_table(text: str, table: list[list[str]]) -> str:
    text = text.replace("`python ", "`python\u00a0")  # commands stay on one line
    text = textwrap.fill(text, 160, break_long_words=False, break_on_hyphens=False).replace("\u00a0", " ")
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in table]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join([text, "", *lines])


def _cell(provider: str, rows: dict[str, Row], unit: str) -> str:
    if provider not in rows:
        return ""
    row, ours = rows[provider], our_row(rows.values())
    if not row["step_ms"]:
        return row["status"]
    if unit == "MiB":
        return f"{float(row['peak_extra_mib']):.0f}" if row["peak_extra_mib"] else ""
    value = _number(row["images_per_s" if unit == "images/s" else "step_ms"])
    return value if row is ours or ours is None else f"{value} ({_ratio(row, ours)})"


def proof(results: Path) -> str:
    """What is proven on which device: a cell for each GPU that has a summary.json."""
    summaries: dict[str, tuple[dict, dict]] = {}
    for path in sorted(results.rglob("summary.json")):
        summary, found = json.loads(path.read_text()), json.loads(path.with_name("environment.json").read_text())
        if found["cuda"] and summary["date"] >= summaries.get(found["gpu"], (summary, found))[0]["date"]:
            summaries[found["gpu"]] = summary, found
    lines = ["| | CPU | GPU |", "|---|---|---|"]
    for what, on_cpu, parts in PROOFS:
        cells = [_proof_cell(parts, *summaries[gpu]) for gpu in sorted(summaries)]
        on_gpu = "; ".join(filter(None, cells)) or "not proven"
        lines.append(f"| {what} | {on_cpu} | {on_gpu} |")
    return "\n".join(lines)


def _proof_cell(parts: Sequence[str], summary: dict, found: dict) -> str:
    """Empty where nothing was run."""
    by_name = {part["part"]: part for part in summary["parts"]}
    ran = [by_name[name] for name in parts if name in by_name and by_name[name]["state"] != "left out"]
    has_dali = any(version for package, version in found["versions"].items() if "dali" in package)
    if not ran or ("other_gpu_tests" in parts and not has_dali):
        return ""
    where = f"{found['gpu']}, {summary['date']}"
    failed = [part for part in ran if part["state"] == "failed"]
    if failed:
        why = ", ".join(f"{part['part']} ({part['figure'] or part['reason']})" for part in failed)
        return f"**fails** on {where}: {why}"
    counts = "".join(f": {part['figure']}" for part in ran if " passed" in part["figure"])
    left_out = [name for name in parts if by_name.get(name) not in ran]
    return f"tested on {where}{counts}" + (f", without {' and '.join(left_out)}" if left_out else "")


def render(readme: str, results: Path) -> str:
    """The README with all sections as the result files and the tests' marks have them.

    Raises:
        ValueError: a section's markers are missing.
    """
    sections = {
        "performance": performance(results),
        "study": study_report.section(results / "study"),
        "proof": proof(results),
        "reliability": reliability.table(ROOT / "tests", results),
    }
    for name, text in sections.items():
        start, end = f"<!-- {name}: made by `make readme-tables` -->", f"<!-- /{name} -->"
        head, found, rest = readme.partition(start)
        _, found_end, tail = rest.partition(end)
        if not (found and found_end):
            raise ValueError(f"README.md: got no section between {start} and {end}")
        readme = f"{head}{start}\n{text}\n{end}{tail}"
    return readme


def main() -> None:
    """Rewrite these sections of README.md."""
    path = ROOT / "README.md"
    try:
        path.write_text(render(path.read_text(), RESULTS))
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
