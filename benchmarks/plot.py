"""Pictures of the result files of relation_loss.py and data_loading.py.

python benchmarks/plot.py benchmarks/results/relation_loss_cpu.csv --output-dir benchmarks/results

One file for each sweep and quantity that the rows have, <name of the CSV>_<sweep>_<quantity>.png: time, extra memory
and share of the floor of a loss, images/s of a loader and how long a loop waits for it.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from labels import OURS, in_order, label, our_row

Rows = list[dict[str, str]]
PEER_BAR, INK, FAINT = "#B4B4B4", "#222222", "#666666"


@dataclass(frozen=True)
class Quantity:
    """A column of the result file, and how it is drawn; a share goes from 0 to 1 and has no ratios."""

    name: str
    column: str
    label: str
    share: bool = False


# By benchmark.
QUANTITIES = {
    "relation_loss": [
        Quantity("time", "step_ms", "time of a step (ms)"),
        Quantity("memory", "peak_extra_mib", "extra memory at its peak (MiB)"),
        Quantity("roof", "floor_share", "floor / time: at 100 % nothing is left to gain", share=True),
    ],
    "data_loading": [
        Quantity("rate", "images_per_s", "images/s"),
        Quantity("wait", "wait_share", "share of the time in which the loop waits", share=True),
    ],
}
# Column on the x axis and its label, of the sweeps over a number that are drawn as lines.
NUMERIC = {
    "tokens": ("num_tokens", "tokens N"),
    "batch": ("batch_size", "images in a batch"),
    "head-dim": ("head_dim_s", "student's head width"),
    "workers": ("num_workers", "workers"),
}
# Column that names the groups of bars, of the other sweeps.
GROUPS = {
    "presets": ("preset", "ViT-{}"),
    "layout": ("layout", "{}"),
    "dtype": ("dtype", "{}"),
    "views": ("views", "views: {}"),
    "source": ("source", "{}"),
    "pause": ("pause_ms", "steps of {} ms"),
}
PLAIN = FuncFormatter(lambda value, _: f"{value:,g}")
PERCENT = PercentFormatter(xmax=1, decimals=0)
MODES = {"forward": "forward", "forward_backward": "forward + backward", "": ""}


def figures(rows: Rows) -> Iterator[tuple[str, Figure]]:
    """Name and picture of everything that the rows of one result file allow."""
    rows = [{"mode": "", **row} for row in rows]
    for sweep in dict.fromkeys(row["sweep"] for row in rows if row["sweep"] in NUMERIC | GROUPS):
        of_sweep = [row for row in rows if row["sweep"] == sweep]
        for quantity in QUANTITIES[rows[0]["benchmark"]]:
            if not any(row[quantity.column] for row in of_sweep) or (quantity.name == "wait" and sweep != "pause"):
                continue
            if sweep in NUMERIC:
                yield f"{sweep}_{quantity.name}", lines(of_sweep, quantity, *NUMERIC[sweep])
            else:
                yield f"{sweep}_{quantity.name}", bars(of_sweep, quantity, *GROUPS[sweep])


def lines(rows: Rows, quantity: Quantity, column: str, x_label: str) -> Figure:
    """One line a provider, named at its end; a line that ends early has the status of its next point."""
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in rows)]
    figure, all_axes = blank(rows, width=7.6 * len(modes), height=5.0, num_axes=len(modes), fixed_but=column)
    for axes, mode in zip(all_axes, modes):
        of_mode = [row for row in rows if row["mode"] == mode]
        ends = []
        for provider in in_order(row["provider"] for row in of_mode):
            series = sorted((r for r in of_mode if r["provider"] == provider), key=lambda r: int(r[column]))
            measured = [row for row in series if row[quantity.column]]
            if not measured:
                continue
            x = [int(row[column]) for row in measured]
            y = [float(row[quantity.column]) for row in measured]
            style, mine = label(provider), provider in OURS
            axes.plot(
                x,
                y,
                color=style.color,
                marker=style.marker,
                markersize=6 if mine else 5,
                linewidth=2.6 if mine else 1.5,
                zorder=3 if mine else 2,
            )
            if quantity.column == "step_ms":
                axes.vlines(x, *percentile_ends(measured), color=style.color, linewidth=1, alpha=0.6)
            missing = next((row for row in series if not row[quantity.column] and int(row[column]) > x[-1]), None)
            note = f"{provider} ({missing['status']})" if missing else provider
            ends.append((x[-1], y[-1], note, style.color, mine))
        ticks = sorted({int(row[column]) for row in of_mode})
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(ticks[0] / 1.08, ticks[-1] * (ticks[-1] / ticks[0]) ** 0.32)
        axes.set_xlabel(x_label)
        scale_y(axes, quantity)
        axes.set_title(MODES[mode], loc="left", fontsize=11, color=INK)
        name_ends(axes, ends)
    all_axes[0].set_ylabel(quantity.label)
    return figure


def bars(rows: Rows, quantity: Quantity, column: str, name: str) -> Figure:
    """A group for each value of the column, a bar for each provider, its number and ratio to ours beside it."""
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in rows)]
    groups = list(dict.fromkeys(row[column] for row in rows))
    providers = in_order(row["provider"] for row in rows)
    height = 1.6 + 0.27 * (len(providers) + 1) * len(groups)
    figure, all_axes = blank(
        rows, width=max(7.6, 6.4 * len(modes)), height=height, num_axes=len(modes), fixed_but=column
    )
    for axes, mode in zip(all_axes, modes):
        drawn = [float(row[quantity.column]) for row in rows if row["mode"] == mode and row[quantity.column]]
        if not drawn:
            continue
        axes.set_xlim(0, 1 if quantity.share else 1.38 * max(drawn))
        ticks, labels = [], []
        y = 0.0
        for group in groups:
            of_group = [row for row in rows if row["mode"] == mode and row[column] == group]
            if not of_group:
                continue
            axes.text(0, y, name.format(group) if group else "", fontsize=10, fontweight="bold", color=INK, va="center")
            mine = our_row(of_group, quantity.column)
            for row in sorted(of_group, key=lambda row: providers.index(row["provider"])):
                y += 1
                provider = row["provider"]
                ticks.append(y)
                labels.append(provider)
                if not row[quantity.column]:
                    axes.text(0, y, f" {row['status']}", fontsize=9, color=FAINT, va="center", style="italic")
                    continue
                value = float(row[quantity.column])
                color = label(provider).color if provider in OURS else PEER_BAR
                axes.barh(y, value, height=0.78, color=color)
                end = value
                if quantity.column == "step_ms":
                    low, high = (limit[0] for limit in percentile_ends([row]))
                    axes.hlines(y, low, high, color=INK, linewidth=1.2)
                    end = max(end, high)
                axes.text(end, y, "  " + bar_label(value, row, mine, quantity), fontsize=9, color=INK, va="center")
            y += 1.5
        axes.set_ylim(y - 0.5, -0.8)
        axes.set_yticks(ticks, labels)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(quantity.label + ("; lines: 20th to 80th percentile" if quantity.column == "step_ms" else ""))
        axes.set_title(MODES[mode], loc="left", fontsize=11, color=INK)
        axes.xaxis.set_major_formatter(PERCENT if quantity.share else PLAIN)
    return figure


def bar_label(value: float, row: dict[str, str], mine: dict[str, str] | None, quantity: Quantity) -> str:
    """The number, and for a peer how many times ours it is."""
    if quantity.share:
        return f"{value:.0%}"
    number = f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"
    if mine is None or row["provider"] in OURS or not float(mine[quantity.column]):
        return number
    return f"{number}  ({value / float(mine[quantity.column]):.2g}x {mine['provider']})"


def percentile_ends(rows: Rows) -> tuple[list[float], list[float]]:
    """20th and 80th percentiles of the times."""
    return tuple([float(row[name]) for row in rows] for name in ("step_ms_p20", "step_ms_p80"))


def scale_y(axes: Axes, quantity: Quantity) -> None:
    """Shares from 0 to at least 100 %, everything else in logarithmic steps."""
    if quantity.share:
        axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
    else:
        axes.set_yscale("log")
    axes.yaxis.set_major_formatter(PERCENT if quantity.share else PLAIN)


def name_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str, bool]], gap: float = 12.0) -> None:
    """Write each line's name to the right of its last point, names at the same x at least `gap` points apart."""
    axes.figure.canvas.draw()
    points = 72 / axes.figure.dpi
    for x in sorted({end[0] for end in ends}):
        here = sorted((end for end in ends if end[0] == x), key=lambda end: end[1])
        wanted = [axes.transData.transform((x, end[1]))[1] * points for end in here]
        for (_, y, note, color, mine), at, placed in zip(here, wanted, spread(wanted, gap)):
            axes.annotate(
                note,
                (x, y),
                xytext=(9, placed - at),
                textcoords="offset points",
                color=color,
                fontsize=9.5,
                fontweight="bold" if mine else "normal",
                va="center",
                path_effects=[withStroke(linewidth=3, foreground="white")],
                zorder=4,
            )


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Ascending positions at least `gap` apart, each cluster around the mean of what it wanted."""
    clusters: list[list[float]] = []
    for position in wanted:
        clusters.append([position])
        while len(clusters) > 1 and low(clusters[-1], gap) - high(clusters[-2], gap) < gap:
            last = clusters.pop()
            clusters[-1] += last
    return [low(cluster, gap) + i * gap for cluster in clusters for i in range(len(cluster))]


def low(cluster: Sequence[float], gap: float) -> float:
    """Where a cluster begins: as far below the mean of what it wanted as it will end above."""
    return sum(cluster) / len(cluster) - gap * (len(cluster) - 1) / 2


def high(cluster: Sequence[float], gap: float) -> float:
    """Where it ends."""
    return low(cluster, gap) + gap * (len(cluster) - 1)


def blank(rows: Rows, *, width: float, height: float, num_axes: int, fixed_but: str) -> tuple[Figure, list[Axes]]:
    """A figure with what is the same in all rows above, and machine and versions below."""
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(rect=(0.005, 0.24 / height, 0.99, 1 - 0.78 / height))
    all_axes = [figure.add_subplot(1, num_axes, i + 1) for i in range(num_axes)]
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT)
        axes.tick_params(colors=INK, labelsize=9.5)
        axes.grid(color="#E6E6E6", linewidth=0.8)
        axes.set_axisbelow(True)
    loss = rows[0]["benchmark"] == "relation_loss"
    title = "Relation loss, " + " and ".join(rows[0]["relations"].upper().split("+")) if loss else "Loading images"
    figure.text(0.01, 1 - 0.1 / height, title, fontsize=12, fontweight="bold", color=INK, va="top")
    figure.text(0.01, 1 - 0.34 / height, what_is_fixed(rows, fixed_but), fontsize=9.5, color=INK, va="top")
    figure.text(0.01, 0.08 / height, footer(rows[0]), fontsize=7.5, color=FAINT, va="bottom")
    return figure, all_axes


def what_is_fixed(rows: Rows, fixed_but: str) -> str:
    """What all rows have in common, but for the column that varies."""
    texts = {
        "preset": "ViT-{}",
        "batch_size": "{} images",
        "num_heads": "{} heads",
        "num_tokens": "{} tokens",
        "head_dim_s": "student's head width {}",
        "head_dim_t": "teacher's {}",
        "dtype": "{}",
        "layout": "{} projections",
        "views": "views: {}",
        "num_workers": "{} workers",
        "kib_per_image": "{} KiB an image",
    }
    values = {column: {row.get(column, "") for row in rows} for column in texts if column != fixed_but}
    return ", ".join(texts[c].format(*found) for c, found in values.items() if len(found) == 1 and found != {""})


def footer(row: dict[str, str]) -> str:
    """Machine, versions, commit and date."""
    threads = f"{row['num_threads']} threads" if row["device_type"] == "cpu" else f"driver {row['driver']}"
    return (
        f"{row['device']}, {threads}, torch {row['torch']}, triton {row['triton']}, commit {row['commit']}, "
        f"{row['date']}. Medians."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw what the files allow; a file of another benchmark is named and passed over."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("results", nargs="+", type=Path, metavar="CSV")
    parser.add_argument("--output-dir", type=Path, required=True)
    args = parser.parse_args(arguments)
    for path in args.results:
        if not path.is_file():
            parser.error(f"{path}: no such file; python benchmarks/relation_loss.py --output {path} makes it")
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        if not rows or rows[0].get("benchmark") not in QUANTITIES:
            print(f"{path}: no rows of {' or '.join(QUANTITIES)}, no picture", file=sys.stderr)
            continue
        args.output_dir.mkdir(parents=True, exist_ok=True)
        for name, figure in figures(rows):
            picture = args.output_dir / f"{path.stem}_{name}.png"
            figure.savefig(picture)
            print(picture)


if __name__ == "__main__":
    main()
