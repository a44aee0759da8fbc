"""Results of an evaluation: JSON for programs, a Markdown table and a picture for people."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tinymim_fast.errors import InputError
from tinymim_fast.files import whole_folder

# Metric: what tables and pictures call it.
NAMES = {
    "top1": "validation images",
    "real": "validation images, ReaL's labels",
    "v2": "ImageNet-V2",
    "sketch": "ImageNet-Sketch",
    "a": "ImageNet-A",
    "r": "ImageNet-R",
    "c": "ImageNet-C, mean of all",
    "knn": "k-NN",
    "linear": "linear probe",
}
METRICS = tuple(NAMES)
COLOR = "#0072B2"


def check_folder(folder: Path) -> None:
    """Refuse what `write_report` could not make.

    Raises:
        InputError: it holds something, argument "output_dir".
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists already; choose another folder or remove it", argument="output_dir")


def write_report(folder: Path, found: Mapping[str, Any]) -> None:
    """`folder` with results.json, results.md and results.png, whole or not at all.

    Args:
        folder: to make; must be missing or empty.
        found: what `evaluate` returns.

    Raises:
        InputError: the folder can't be written; argument "output_dir".
    """
    try:
        with whole_folder(folder) as temporary:
            (temporary / "results.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
            (temporary / "results.md").write_text(markdown(found), encoding="utf-8")
            draw(temporary / "results.png", found)
    except OSError as error:
        raise InputError(f"{folder}: can't be written: {error}", argument="output_dir") from error


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """What a program says of the results, a line each."""
    for metric, result in found["results"].items():
        if metric == "knn":
            for k, of_k in result.items():
                yield f"k-NN accuracy{f', k = {k}' if len(result) > 1 else ''}: {of_k['top1']:.2f} %"
        elif metric == "linear":
            yield f"linear probe: {result['top1']:.2f} %, weight decay {result['weight_decay']:g}"
        elif metric == "c":
            mce = f", mCE {result['mce']:.2f} %" if "mce" in result else ""
            yield f"{NAMES[metric]}: error {result['mean_error']:.2f} %{mce}"
        else:
            top5 = f", top-5 {result['top5']:.2f} %" if "top5" in result else ""
            yield f"{NAMES[metric]}: top-1 {result['top1']:.2f} %{top5}, {result['num_images']} images"


def accuracies(found: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name, and `num_images`, `top1` and perhaps `top5`, of each accuracy in the results."""
    for metric, result in found["results"].items():
        if metric == "knn":
            yield from ((f"{NAMES[metric]}, k = {k}", of_k) for k, of_k in result.items())
        elif metric == "c":
            num_images = sum(images for of_c in result["counts"].values() for images, _ in of_c)
            yield NAMES[metric], {"num_images": num_images, "top1": 100 - result["mean_error"]}
        else:
            yield NAMES[metric], result


def markdown(found: Mapping[str, Any]) -> str:
    """A table of accuracies, and one of the errors on corrupted images where there are any."""
    model, images = found["model"], found["images"]
    text = [
        f"{found['checkpoint']}: {model['architecture']} ({model['kind']}), images of {images['img_size']} pixels from "
        f"{images['resize_size']}.",
        "",
        "| | images | top-1 % | top-5 % |",
        "|---|---|---|---|",
    ]
    for name, result in accuracies(found):
        top5 = f"{result['top5']:.2f}" if "top5" in result else ""
        text.append(f"| {name} | {result['num_images']} | {result['top1']:.2f} | {top5} |")
    corrupted = found["results"].get("c")
    if corrupted:
        relative = corrupted.get("corruption_errors", {})
        severities = range(1, 1 + max(map(len, corrupted["errors"].values())))
        text += [
            "",
            f"| top-1 error % | {' | '.join(f'severity {s}' for s in severities)} | of AlexNet's |",
            "|---" * (len(severities) + 2) + "|",
        ]
        for corruption, errors in corrupted["errors"].items():
            cells = [f"{error:.2f}" for error in errors]
            cells.append(f"{relative[corruption]:.1f}" if relative else "")
            text.append(f"| {corruption.replace('_', ' ')} | {' | '.join(cells)} |")
        if "mce" in corrupted:
            text += ["", f"mCE {corrupted['mce']:.2f} %"]
    return "\n".join(text) + "\n"


def draw(path: Path, found: Mapping[str, Any]) -> None:
    """A PNG with a bar an accuracy, and a map of the errors on corrupted images where there are any."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars = [(name, result["top1"]) for name, result in accuracies(found)]
    corrupted = found["results"].get("c")
    height = max(0.42 * len(bars) + 1.1, 5.2 if corrupted else 0)
    figure = Figure(figsize=(11 if corrupted else 6.5, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{Path(found['checkpoint']).name}: {found['model']['architecture']}", fontsize=10)
    panels = figure.subplots(1, 2 if corrupted else 1, squeeze=False)[0]
    names, values = zip(*bars)
    drawn = panels[0].barh(names, values, color=COLOR)
    panels[0].bar_label(drawn, fmt="%.1f", padding=3)
    panels[0].invert_yaxis()
    panels[0].set(xlabel="top-1 accuracy %", xlim=(0, 108))
    panels[0].spines[["top", "right"]].set_visible(False)
    if corrupted:
        errors = list(corrupted["errors"].values())
        shown = panels[1].imshow(errors, cmap="viridis_r", vmin=0, vmax=100, aspect="auto")
        panels[1].set_xticks(range(len(errors[0])), range(1, 1 + len(errors[0])))
        panels[1].set_yticks(range(len(errors)), [c.replace("_", " ") for c in corrupted["errors"]])
        panels[1].set(xlabel="severity")
        figure.colorbar(shown, ax=panels[1], label="top-1 error %")
    figure.savefig(path, dpi=130)
