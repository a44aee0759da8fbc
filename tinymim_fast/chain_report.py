"""All stages of a chain in one table and one picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinymim_fast.config import RunConfig
from tinymim_fast.files import whole_file, write_text
from tinymim_fast.models.checkpoints import describe, latest_checkpoint
from tinymim_fast.training.metrics import read_metrics

COLUMNS = {  # key of chain.json: title and format in chain.md
    "stage": ("stage", "{}"),
    "teacher": ("teacher", "{}"),
    "student": ("student", "{}"),
    "width": ("width", "{}"),
    "epochs": ("epochs", "{}"),
    "steps": ("steps", "{}"),
    "first_loss": ("first loss", "{:.4g}"),
    "last_loss": ("last loss", "{:.4g}"),
    "images_per_s": ("images/s", "{:.0f}"),
    "hours": ("hours", "{:.2f}"),
}


def report(folder: Path, runs: Mapping[str, RunConfig]) -> str:
    """Write `folder`/chain.md, chain.json and chain.png; gives the table.

    Args:
        folder: of the chain.
        runs: each stage's configuration by name, in order.

    Raises:
        OSError: a file can't be written.
    """
    records = {name: read_metrics(Path(config.output_dir)) for name, config in runs.items()}
    rows = [row(name, config, records[name]) for name, config in runs.items()]
    table = markdown(rows)
    write_text(folder / "chain.json", json.dumps(rows, indent=2) + "\n")
    write_text(folder / "chain.md", table)
    plot(folder / "chain.png", records)
    return table


def row(name: str, config: RunConfig, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What chain.json says of one stage; None where its metrics don't.

    `hours` is the time of its steps alone, without starts, checkpoints and stops.
    """
    told = [r for r in records if isinstance(r.get("loss"), float) and r.get("images_per_s")]
    steps = [0, *(r["step"] for r in told)]
    seconds = [
        (step - before) * config.train_batch_size / r["images_per_s"] for before, step, r in zip(steps, steps[1:], told)
    ]
    latest = latest_checkpoint(Path(config.output_dir))
    return {
        "stage": name,
        "teacher": Path(config.teacher_checkpoint).name,
        "student": config.student_model,
        "width": None if latest is None else describe(latest).head_layout["embed_dim"],
        "epochs": config.epochs,
        "steps": steps[-1] if told else None,
        "first_loss": told[0]["loss"] if told else None,
        "last_loss": told[-1]["loss"] if told else None,
        "images_per_s": statistics.median(r["images_per_s"] for r in told) if told else None,
        "hours": sum(seconds) / 3600 if told else None,
        "last": dict(told[-1]) if told else None,
        "checkpoint": None if latest is None else str(latest),
    }


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table, a line a stage."""
    lines = [[title for title, _ in COLUMNS.values()]]
    lines += [
        ["–" if row[key] is None else form.format(row[key]) for key, (_, form) in COLUMNS.items()] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "".join(f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths))} |\n" for line in lines)


def plot(path: Path, records: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """A PNG with a panel a stage: the loss by step, all on one scale.

    Raises:
        OSError: it can't be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(4.5, 3.4 * len(records)), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(records), sharey=True, squeeze=False)[0]
    for number, (panel, (name, of_stage)) in enumerate(zip(panels, records.items(), strict=True)):
        told = [r for r in of_stage if isinstance(r.get("loss"), float) and r["loss"] > 0]
        panel.plot([r["step"] for r in told], [r["loss"] for r in told], color=f"C{number}", linewidth=1.6)
        panel.set(title=name, xlabel="optimizer step", yscale="log", ylabel="" if number else "loss")
        if told:
            last = told[-1]["loss"]
            panel.annotate(f"{last:.3g}", (told[-1]["step"], last), (-2, 5), textcoords="offset points", ha="right")
        panel.grid(alpha=0.3, which="both")
        panel.spines[["top", "right"]].set_visible(False)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120)
