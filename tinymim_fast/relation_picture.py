"""Relation rows of several models over their images, as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tinymim_fast.files import whole_file
from tinymim_fast.relation_maps import Compared

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Inches.
PANEL, GAP = 1.5, 0.06
LABEL, HEAD, BARS = 0.5, 0.8, 1.4  # left of the images, above and below all lines
CMAP = "inferno"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the picture.

    Args:
        of: the image and its relations.
        query: patch, 0-based, in reading order.
        head: 0-based; None: the mean over heads.
    """

    of: Compared
    query: int
    head: int | None

    def row(self, relation: str, model: str) -> np.ndarray:
        """What the query relates to, (patches,)."""
        heads = self.of.rows[relation][model]
        return (heads.mean(0) if self.head is None else heads[self.head])[self.query].numpy()

    def kl(self, relation: str, model: str) -> float | None:
        """KL to the teacher of this head, or of all; None of the teacher itself."""
        heads = self.of.kl[relation].get(model)
        return None if heads is None else float(heads.mean() if self.head is None else heads[self.head])

    def continues(self, before: Line) -> bool:
        """Whether the line before is of the same query on the same image."""
        return self.of is before.of and self.query == before.query

    def label(self, grid: tuple[int, int], *, first: bool) -> str:
        """What the line shows; the first of a query says which, row and column from 1."""
        heads = "mean over heads" if self.head is None else f"head {self.head + 1}"
        place = f"query {self.query // grid[1] + 1},{self.query % grid[1] + 1}"
        return f"{place}\n{heads}" if first else heads


def lines_of(compared: Compared, queries: Sequence[int], heads: Sequence[int] = ()) -> list[Line]:
    """For each query a line with the mean over heads, and one for each of `heads`, 0-based."""
    return [Line(of=compared, query=query, head=head) for query in queries for head in (None, *heads)]


def title_of(relation: str) -> str:
    """ "qk" as Q Kᵀ."""
    return f"{relation[0].upper()} {relation[1].upper()}\u1d40"


def draw(path: str | Path, lines: Sequence[Line], grid: tuple[int, int], *, title: str) -> None:
    """A PNG: in each line an image with its query framed, then for each relation what each model relates the query to.

    In one line and relation all maps share a colour scale, from 0 to the teacher's largest value. Below stands each
    head's KL, mean over the images. The number in a map is the KL of what it shows.

    Args:
        path: of the picture; appears whole or not at all.
        lines: from above; all have the same relations and models.
        grid: rows and columns of patches.
        title: over the picture.

    Raises:
        ValueError: rows that are not the grid's.
        OSError: the picture can't be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    relations = {relation: list(of_model) for relation, of_model in lines[0].of.rows.items()}
    starts = [0, *(i for i in range(1, len(lines)) if not lines[i].continues(lines[i - 1]))]  # of new queries
    bars = BARS if any(lines[0].of.kl.values()) else 0.0
    # From the left and the top, in inches: where each line and each relation begins.
    tops = [HEAD + i * (PANEL + GAP) + 2 * GAP * sum(start <= i for start in starts) for i in range(len(lines))]
    lefts, right = {}, LABEL + PANEL
    for relation, models in relations.items():
        lefts[relation] = right + 7 * GAP
        right = lefts[relation] + len(models) * (PANEL + GAP)
    width, height = max(right + 2 * GAP, 5.5), tops[-1] + PANEL + 2 * GAP + bars
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)

    def panel(left: float, top: float, wide: float = PANEL, high: float = PANEL) -> Axes:
        return figure.add_axes((left / width, 1 - (top + high) / height, wide / width, high / height))

    figure.text(LABEL / width, 1 - 0.12 / height, title, fontsize=9, va="top")
    for number, (line, top) in enumerate(zip(lines, tops, strict=True)):
        axes = panel(LABEL, top)
        axes.imshow(line.of.image)
        axes.set_ylabel(line.label(grid, first=number in starts), fontsize=7.5)
        _frame(axes, line, grid)
    for relation, models in relations.items():
        wide = len(models) * (PANEL + GAP) - GAP
        middle = (lefts[relation] + wide / 2) / width
        figure.text(middle, 1 - 0.42 / height, title_of(relation), fontsize=11, ha="center", va="top")
        for line, top in zip(lines, tops, strict=True):
            most = line.row(relation, models[0]).max()
            for column, model in enumerate(models):
                axes = panel(lefts[relation] + column * (PANEL + GAP), top)
                _map(axes, line, grid, line.row(relation, model), most)
                _frame(axes, line, grid)
                if line is lines[0]:
                    axes.set_title(model, fontsize=9, pad=4)
                if (kl := line.kl(relation, model)) is not None:
                    _note(axes, f"{kl:.3f}")
        if bars:
            _bars(panel(lefts[relation], tops[-1] + PANEL + 3 * GAP, wide, bars - 0.5), lines, relation)
    if bars:
        where = LABEL / width, 1 - (tops[-1] + PANEL + 3 * GAP) / height
        figure.text(*where, "KL of each head\nfrom the teacher's,\nnats", fontsize=8, va="top")
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=130)


def _note(axes: Axes, text: str) -> None:
    """Small words in the lower right corner."""
    box = {"facecolor": "black", "alpha": 0.6, "pad": 1.2, "linewidth": 0}
    axes.text(0.97, 0.04, text, transform=axes.transAxes, ha="right", color="white", fontsize=7, bbox=box)


def _map(axes: Axes, line: Line, grid: tuple[int, int], row: np.ndarray, top: float) -> None:
    """One row of relations over the grey image."""
    height, width = line.of.image.shape[:2]
    axes.imshow(np.asarray(line.of.image, dtype=np.float64).mean(-1), cmap="gray", vmin=0, vmax=255)
    axes.imshow(
        row.reshape(grid), cmap=CMAP, vmin=0, vmax=top, alpha=0.75, extent=(-0.5, width - 0.5, height - 0.5, -0.5)
    )


def _frame(axes: Axes, line: Line, grid: tuple[int, int]) -> None:
    """The query patch in a frame, and no axes."""
    from matplotlib.patches import Rectangle

    height, width = line.of.image.shape[0] / grid[0], line.of.image.shape[1] / grid[1]
    corner = line.query % grid[1] * width - 0.5, line.query // grid[1] * height - 0.5
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="cyan", linewidth=1.3))


def _bars(axes: Axes, lines: Sequence[Line], relation: str) -> None:
    """Each student's KL by head, mean over the different images of the lines."""
    compared = list({id(line.of): line.of for line in lines}.values())
    students = list(compared[0].kl[relation])
    for number, student in enumerate(students):
        heads = torch.stack([of.kl[relation][student] for of in compared]).mean(0)
        at = np.arange(1, len(heads) + 1) + (number - (len(students) - 1) / 2) * 0.8 / len(students)
        axes.bar(at, heads.numpy(), width=0.8 / len(students), label=student)
    shown: dict[str, Any] = {"xlabel": "head"}
    if len(heads) <= 16:
        shown["xticks"] = range(1, len(heads) + 1)
    axes.set(**shown)
    axes.xaxis.label.set_size(7)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    if len(students) > 1:
        axes.set_ylim(0, 1.3 * axes.get_ylim()[1])  # room for the legend
        axes.legend(frameon=False, fontsize=7, ncols=len(students), loc="upper left")
