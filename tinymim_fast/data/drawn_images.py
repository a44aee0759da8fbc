"""A labelled folder of drawn pictures: something to learn from in a minute, without any download.

Sixteen classes of shapes and textures in random poses, sizes, strokes and colours, over gradients, clutter and
noise. All classes draw their colours from one distribution, so form has to be learnt and colour does not help.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tinymim_fast.data.errors import DataError
from tinymim_fast.files import whole_folder

_MARKER = "drawn_images.json"  # says that this module wrote the folder, and with which arguments
_VERSION = 1  # of the drawings: raise it when they change

# A form maps coordinates (x, y) and a generator to a signed distance, negative inside, in the unit of x and y:
# half an extent for shapes, a quarter of the image's side for textures.
Form = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]


def _disc(x, y, rng):
    return np.hypot(x, y * rng.uniform(1.0, 1.25)) - 1


def _ring(x, y, rng):
    return np.abs(np.hypot(x, y) - 0.8) - rng.uniform(0.1, 0.2)


def _polygon(x, y, num_sides):
    angles = 2 * np.pi * np.arange(num_sides) / num_sides
    return np.max([x * np.cos(a) + y * np.sin(a) for a in angles], axis=0) - np.cos(np.pi / num_sides)


def _triangle(x, y, rng):
    return _polygon(x, y, 3)


def _square(x, y, rng):
    return _polygon(x, y, 4)


def _star(x, y, rng):
    sector, inner = 2 * np.pi / 5, rng.uniform(0.38, 0.5)
    angle = np.abs(np.mod(np.arctan2(y, x) + sector / 2, sector) - sector / 2)  # folded into half a point
    radius = np.hypot(x, y)
    # the edge runs from the tip (1, 0) to the inner corner
    edge_x, edge_y = inner * np.cos(sector / 2) - 1, inner * np.sin(sector / 2)
    return ((radius * np.cos(angle) - 1) * edge_y - radius * np.sin(angle) * edge_x) / np.hypot(edge_x, edge_y)


def _plus(x, y, rng):
    half_stroke = rng.uniform(0.18, 0.32)
    x, y = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(x - 1, y - half_stroke), np.maximum(y - 1, x - half_stroke))


def _crescent(x, y, rng):
    return np.maximum(np.hypot(x, y) - 1, rng.uniform(0.8, 0.9) - np.hypot(x - rng.uniform(0.4, 0.6), y))


def _spiral(x, y, rng):
    turns, hand = rng.uniform(2.2, 3.2), rng.choice([-1, 1])
    radius = np.hypot(x, y)
    return np.maximum(_wave(radius - hand * np.arctan2(y, x) / (2 * np.pi * turns), 1 / turns), radius - 1)


def _wave(u, period):
    """Signed distance to stripes across u: half of each period is inside."""
    return (np.abs(np.mod(u / period, 1) - 0.5) - 0.25) * period


def _period(rng):
    return rng.uniform(0.35, 0.9)


def _horizontal_stripes(x, y, rng):
    return _wave(y + rng.uniform(0, 1), _period(rng))


def _vertical_stripes(x, y, rng):
    return _wave(x + rng.uniform(0, 1), _period(rng))


def _diagonal_stripes(x, y, rng):
    return _wave((x + rng.choice([-1, 1]) * y) / np.sqrt(2) + rng.uniform(0, 1), _period(rng))


def _checkerboard(x, y, rng):
    period = 1.3 * _period(rng)
    a, b = _wave(x + rng.uniform(0, 1), period), _wave(y + rng.uniform(0, 1), period)
    return np.maximum(np.minimum(a, b), -np.maximum(a, b))


def _dot_grid(x, y, rng):
    period = _period(rng)
    u, v = np.mod(x / period + rng.uniform(), 1) - 0.5, np.mod(y / period + rng.uniform(), 1) - 0.5
    return (np.hypot(u, v) - rng.uniform(0.25, 0.4)) * period


def _waves(x, y, rng):
    period = _period(rng)
    swing = rng.uniform(0.5, 0.8) * period * np.sin(2 * np.pi * (x / rng.uniform(1.2, 2.0) + rng.uniform()))
    return _wave(y + swing + rng.uniform(0, 1), period)


def _rays(x, y, rng):
    num_rays = rng.integers(6, 13)
    turn = np.arctan2(y, x) / (2 * np.pi)
    return _wave(turn + rng.uniform(), 1 / num_rays) * 2 * np.pi * np.hypot(x, y)


_SHAPES: dict[str, Form] = {
    "disc": _disc,
    "ring": _ring,
    "triangle": _triangle,
    "square": _square,
    "star": _star,
    "plus": _plus,
    "crescent": _crescent,
    "spiral": _spiral,
}
_TEXTURES: dict[str, Form] = {
    "horizontal_stripes": _horizontal_stripes,
    "vertical_stripes": _vertical_stripes,
    "diagonal_stripes": _diagonal_stripes,
    "checkerboard": _checkerboard,
    "dot_grid": _dot_grid,
    "waves": _waves,
    "rays": _rays,
    "concentric_rings": lambda x, y, rng: _wave(np.hypot(x, y) + rng.uniform(0, 1), _period(rng)),
}
DRAWN_CLASSES = tuple(sorted([*_SHAPES, *_TEXTURES]))


def draw_image_folder(
    root: str | Path, *, num_train_per_class: int, num_val_per_class: int, size: int, seed: int
) -> Path:
    """Draw root/train/<class>/*.jpg and root/val/<class>/*.jpg, the same pictures for the same arguments.

    The folder is drawn under a temporary name beside `root` and renamed when complete. A folder drawn earlier is kept
    if its arguments were the same, and replaced if not.

    Args:
        root: folder to make; its parents are made too.
        num_train_per_class: pictures of each of the DRAWN_CLASSES.
        num_val_per_class: the same, for validation.
        size: side of the square pictures, pixels.
        seed: of the pictures.

    Returns:
        `root`.

    Raises:
        DataError: `root` holds something that this function did not write.
    """
    root = Path(root)
    made_from = {
        "version": _VERSION,
        "num_train_per_class": num_train_per_class,
        "num_val_per_class": num_val_per_class,
        "size": size,
        "seed": seed,
    }
    marker = root / _MARKER
    if marker.is_file():
        if json.loads(marker.read_text()) == made_from:
            return root
    elif root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise DataError(f"got {root}, which holds something else; want a new or empty folder for the drawn images")

    with whole_folder(root) as drawn:
        for split_id, (split, count) in enumerate([("train", num_train_per_class), ("val", num_val_per_class)]):
            for label, name in enumerate(DRAWN_CLASSES):
                folder = drawn / split / name
                folder.mkdir(parents=True)
                for i in range(count):
                    picture = draw_picture(name, size, np.random.default_rng([seed, split_id, label, i]))
                    Image.fromarray(picture).save(folder / f"{i:05d}.jpg", quality=92)
        (drawn / _MARKER).write_text(json.dumps(made_from, indent=2) + "\n")
        if marker.is_file():
            shutil.rmtree(root)
    return root


def draw_picture(name: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """One picture of the class `name`: (size, size, 3) uint8."""
    y, x = np.mgrid[:size, :size].astype(np.float32) + 0.5  # pixels
    background, foreground = _two_colors(rng)
    canvas = _gradient(background, x, y, size, rng)
    _clutter(canvas, x, y, size, rng, num_spots=rng.integers(2, 7))
    if name in _SHAPES:
        radius, turn = size * rng.uniform(0.22, 0.4), rng.uniform(0, 2 * np.pi)
        room = max(0.0, size / 2 - radius)
        center = size / 2 + rng.uniform(-room, room, 2)
        form = _SHAPES[name]
    else:
        radius, turn = size / 4, rng.uniform(-0.2, 0.2)
        center = size * rng.uniform(0.3, 0.7, 2)
        form = _TEXTURES[name]
    u, v = (x - center[0]) / radius, (y - center[1]) / radius
    distance = form(u * np.cos(turn) + v * np.sin(turn), v * np.cos(turn) - u * np.sin(turn), rng) * radius
    _paint(canvas, distance, _gradient(foreground, x, y, size, rng))
    _clutter(canvas, x, y, size, rng, num_spots=rng.integers(0, 4))
    noise = rng.normal(0, rng.uniform(2, 14), canvas.shape).astype(np.float32)
    return np.clip(canvas + noise, 0, 255).astype(np.uint8)


def _two_colors(rng: np.random.Generator) -> np.ndarray:
    """(2, 3) colours, 0..255, exchangeable and far enough apart to tell which is which."""
    while True:
        colors = rng.uniform(20, 235, (2, 3)).astype(np.float32)
        if np.abs(colors[0] - colors[1]).sum() > 150:
            return colors


def _gradient(color, x, y, size, rng) -> np.ndarray:
    """(size, size, 3) float32: the colour with a linear change of brightness."""
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, 50)
    ramp = (np.cos(angle) * x + np.sin(angle) * y) / size - (np.cos(angle) + np.sin(angle)) / 2
    return (color + strength * ramp[..., None]).astype(np.float32)


def _clutter(canvas, x, y, size, rng, num_spots) -> None:
    """Small ellipses of any colour."""
    for _ in range(num_spots):
        center, axes = rng.uniform(0, size, 2), size * rng.uniform(0.015, 0.06, 2)
        distance = (np.hypot((x - center[0]) / axes[0], (y - center[1]) / axes[1]) - 1) * axes.min()
        _paint(canvas, distance, rng.uniform(0, 255, 3).astype(np.float32))


def _paint(canvas, distance, color) -> None:
    """Blend `color` where the signed distance (pixels) is negative, with an edge of one pixel."""
    canvas += np.clip(0.5 - distance, 0, 1)[..., None].astype(np.float32) * (color - canvas)
