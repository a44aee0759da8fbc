"""What the study found so far: a CSV with a line a student, the table of means with 95 % intervals, and a picture.

With Python alone but for the picture; readme_tables.py puts the table into the README.
"""

from __future__ import annotations

import csv
import datetime
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import machine

if TYPE_CHECKING:
    from study_plan import Plan
    from study_rows import Row, Sizes

CSV, TABLE, PICTURE = "study.csv", "study.md", "study.png"
METRICS = {"top1": "fine-tuned top-1 %", "linear": "linear probe %", "knn": "k-NN %"}
# Student's t, two-sided 95 %, by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
COLORS = {"methods": "#0072B2", "relations": "#009E73"}  # Okabe and Ito's palette
Line = dict[str, str]


class Report:
    """The files of one study, whole after each student.

    Args:
        folder: of CSV, table and picture; what its CSV holds of other students stays.
        sizes: of the models.
    """

    def __init__(self, folder: Path, sizes: Sizes):
        self.folder, self.sizes = folder, sizes

    def add(
        self, plan: Plan, row: Row | None, seed: int, results: Mapping[str, Any], *, seconds: float, epochs: str
    ) -> None:
        """A student's line, or the teacher's where `row` is None; the files are written anew.

        Args:
            plan: of the study.
            row: of the student.
            seed: of the student.
            results: of `evaluate`, by metric.
            seconds: of its training steps.
            epochs: of its stages.
        """
        import torch

        from tinymim_fast.files import write_text

        probes = {"linear": results.get("linear"), "knn": next(iter(results.get("knn", {}).values()), None)}
        found = {"top1": results.get("top1"), **probes}
        line = {
            "row": row.name if row else "teacher",
            "title": row.title if row else "the teacher, a masked autoencoder",
            "group": row.group if row else "teacher",
            "paper": row.paper if row else "",
            "seed": str(seed),
            **{name: f"{of_metric['top1']:.2f}" if of_metric else "" for name, of_metric in found.items()},
            "num_images": str(max(of_metric["num_images"] for of_metric in found.values() if of_metric)),
            "epochs": epochs,
            "batch_size": str(self.sizes.batch_size),
            "minutes": f"{seconds / 60:.1f}",
            "precision": "bf16" if plan.bf16 else "fp32",
            "device": machine.cpu_name(),
            "torch": torch.__version__,
            "commit": machine.commit(),
            "date": datetime.date.today().isoformat(),
        }
        path = self.folder / CSV
        kept = [old for old in read(path) if (old["row"], old["seed"]) != (line["row"], line["seed"])]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(line), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, line])
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(path, text.getvalue())
        lines = read(path)
        write_text(self.folder / TABLE, table(lines) + "\n")
        draw(self.folder / PICTURE, lines)


def read(path: Path) -> list[Line]:
    """The lines of a CSV; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval by Student's t; NaN for one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, T95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))


def summary(lines: Sequence[Line]) -> dict[str, dict[str, tuple[float, float]]]:
    """Mean and half interval by metric, by row in the order of the first lines."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for name in dict.fromkeys(line["row"] for line in lines):
        of_row = [line for line in lines if line["row"] == name]
        values = {metric: [float(line[metric]) for line in of_row if line[metric]] for metric in METRICS}
        found[name] = {metric: interval(numbers) for metric, numbers in values.items() if numbers}
    return found


def in_groups(lines: Sequence[Line]) -> list[Line]:
    """One line a row: the teacher's, then the methods, then what is compared with relations below their line."""
    first: dict[str, Line] = {}
    for line in lines:
        first.setdefault(line["row"], line)
    order = ("teacher", "methods", "relations")
    return sorted(first.values(), key=lambda line: order.index(line["group"]))


def table(lines: Sequence[Line]) -> str:
    """Markdown: a line a row, means with 95 % intervals, the paper's numbers as the paper's."""
    found = summary(lines)
    text = [
        "| | " + " | ".join(METRICS.values()) + " | the paper's, ImageNet top-1 % |",
        "|---" * (len(METRICS) + 2) + "|",
    ]
    group = ""
    for line in in_groups(lines):
        if line["group"] == "relations" != group:
            text.append("| *relations QK + VV, but* | " + " | " * len(METRICS) + " |")
        group = line["group"]
        cells = [_cell(found[line["row"]].get(metric)) for metric in METRICS]
        text.append(f"| {line['title']} | {' | '.join(cells)} | {line['paper']} |")
    return "\n".join(text)


def _cell(value: tuple[float, float] | None) -> str:
    if value is None:
        return ""
    mean, half = value
    return f"{mean:.1f}" if math.isnan(half) else f"{mean:.1f} ± {half:.1f}"


def section(results: Path) -> str:
    """For the README: how it was made, the table and the picture; a sentence where there are no results."""
    lines = read(results / CSV)
    if not lines:
        return "Not run yet."
    last = lines[-1]
    seeds = sorted({line["seed"] for line in lines if line["row"] != "teacher"})
    minutes = sum(float(line["minutes"]) for line in lines)
    epochs = "; ".join(dict.fromkeys(line["epochs"] for line in lines))
    how = (
        f"{last['num_images']} validation images, seeds {', '.join(seeds)}, mean and 95 % interval. Epochs: {epochs}; "
        f"batch {last['batch_size']}, {last['precision']}, {minutes / 60:.1f} hours of training on {last['device']}. "
        f"{last['date']}, commit {last['commit']}, torch {last['torch']}: `python benchmarks/study.py`."
    )
    return (
        f"{how}\n\n{table(lines)}\n\n![Students by the way they were pre-trained](benchmarks/results/study/{PICTURE})"
    )


def draw(path: Path, lines: Sequence[Line]) -> None:
    """A PNG with a panel a metric: each student a dot, means with 95 % intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from tinymim_fast.files import whole_file

    found = summary(lines)
    rows = [line for line in in_groups(lines) if line["group"] != "teacher"] or in_groups(lines)
    figure = Figure(figsize=(11, 0.36 * len(rows) + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(METRICS), sharey=True)
    for panel, (metric, title) in zip(panels, METRICS.items(), strict=True):
        for place, line in enumerate(rows):
            color = COLORS.get(line["group"], "#7F7F7F")
            values = [float(other[metric]) for other in lines if other["row"] == line["row"] and other[metric]]
            if not values:
                continue
            mean, half = found[line["row"]][metric]
            panel.errorbar(mean, place, xerr=0 if math.isnan(half) else half, fmt="o", color=color, capsize=3)
            panel.plot(values, [place] * len(values), "|", color=color, alpha=0.6)
        panel.set(xlabel=title)
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(rows)), [line["title"] for line in rows])
    panels[0].invert_yaxis()
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=130)
