"""Token relations to look at: rows of the relation of two projections, and a picture of them over their image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from tinymim_fast.files import whole_file


def relation_rows(qkv: torch.Tensor, relation: str, heads: int) -> torch.Tensor:
    """How much each token relates to each other one: softmax over keys of x y^T / sqrt(D), a head at a time.

    Args:
        qkv: packed [q | k | v], (B, N, 3 C), any floating dtype.
        relation: the letters of x and y: "qk", "vv", "qq" or "kk".
        heads: relation heads; heads are consecutive groups of D = C / heads channels.

    Returns:
        (B, heads, N, N), fp32 (fp64 for fp64), each row a distribution over keys.
    """
    parts = dict(zip("qkv", qkv.to(torch.promote_types(qkv.dtype, torch.float32)).chunk(3, dim=-1), strict=True))
    x, y = (parts[name].unflatten(-1, (heads, -1)).transpose(1, 2) for name in relation)
    return torch.softmax(x @ y.mT * x.shape[-1] ** -0.5, dim=-1)


def head_kl(rows_t: torch.Tensor, rows_s: torch.Tensor) -> torch.Tensor:
    """Mean over rows of KL(teacher row || student row), (B, heads) in nats, from `relation_rows` (B, heads, N, N)."""
    tiny = torch.finfo(rows_s.dtype).tiny  # a probability that underflowed counts as the smallest there is
    return (torch.xlogy(rows_t, rows_t) - rows_t * rows_s.clamp_min(tiny).log()).sum(-1).mean(-1)


def telling_queries(rows: torch.Tensor, count: int) -> list[int]:
    """Patches whose rows differ most from the mean row and from one another, by farthest points.

    Args:
        rows: (N, N), of patches only.
        count: how many, at most N.

    Returns:
        Row numbers, each once.
    """
    distance = (rows - rows.mean(0)).norm(dim=-1)
    chosen: list[int] = []
    for _ in range(count):
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (rows - rows[chosen[-1]]).norm(dim=-1))
        distance[chosen] = -1
    return chosen


def draw_relation_maps(
    path: str | Path,
    image: np.ndarray,
    grid: tuple[int, int],
    queries: Sequence[int],
    maps: Mapping[str, Mapping[str, np.ndarray]],
    *,
    title: str,
) -> None:
    """A PNG with a line for each query patch: the image, then for each relation what each model relates the query to.

    The query is framed. In one line and relation all maps share one colour scale, from 0 to the first model's largest
    value.

    Args:
        path: of the picture; appears whole or not at all.
        image: (height, width, 3), 0..255.
        grid: rows and columns of patches.
        queries: patch numbers, 0-based, in reading order.
        maps: by the relation's title, then by the model's in the order of columns, (len(queries), patches), 0..1.
        title: over the picture.

    Raises:
        OSError: the picture can't be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    height, width = image.shape[:2]
    patch_height, patch_width = height / grid[0], width / grid[1]
    numbers_of_columns = [1, *(len(of_model) for of_model in maps.values())]
    figure = Figure(figsize=(1.5 * sum(numbers_of_columns) + 0.4, 1.5 * len(queries) + 1.3), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    groups = figure.subfigures(1, len(numbers_of_columns), width_ratios=numbers_of_columns, squeeze=False)[0]
    panels = [
        group.subplots(len(queries), num, squeeze=False) for group, num in zip(groups, numbers_of_columns, strict=True)
    ]
    for column in panels[0]:
        column[0].imshow(image)
    groups[0].suptitle(" ", fontsize=11)  # as high as the relations' titles, so that the lines are level
    panels[0][0, 0].set_title("image\nand query", fontsize=9)
    grey = np.asarray(image, dtype=np.float64).mean(-1)
    for group, lines, (relation, of_model) in zip(groups[1:], panels[1:], maps.items(), strict=True):
        group.suptitle(relation, fontsize=11)
        tops = next(iter(of_model.values())).max(-1)
        for column, (model, rows) in enumerate(of_model.items()):
            lines[0, column].set_title(model, fontsize=9)
            for panel, row, top in zip(lines[:, column], rows, tops, strict=True):
                panel.imshow(grey, cmap="gray", vmin=0, vmax=255)
                panel.imshow(
                    row.reshape(grid), cmap="inferno", vmin=0, vmax=top, alpha=0.75,
                    extent=(-0.5, width - 0.5, height - 0.5, -0.5),
                )  # fmt: skip
    for lines in panels:
        for line, query in zip(lines, queries, strict=True):
            corner = query % grid[1] * patch_width - 0.5, query // grid[1] * patch_height - 0.5
            for panel in line:
                panel.set(xticks=[], yticks=[])
                panel.spines[:].set_visible(False)
                panel.add_patch(
                    Rectangle(corner, patch_width, patch_height, fill=False, edgecolor="cyan", linewidth=1.5)
                )
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=130)
