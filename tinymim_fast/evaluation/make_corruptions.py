"""ImageNet-C style images of any folder, by the package imagecorruptions-imaug (the set's own functions, maintained).

    OUT/<corruption>/<severity>/<class>/<file>.JPEG

As the set's authors made theirs: resized and cropped as for evaluation first, then corrupted, then JPEG of quality 85.
Corruptions have strengths for 224 pixels; much smaller images (the package takes 32 pixels and more) suffer more.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torchvision.transforms.functional as F
from PIL import Image

from tinymim_fast.data import ImageIndex
from tinymim_fast.data.parallel import Progress, in_parallel
from tinymim_fast.data.views import EvalView
from tinymim_fast.errors import InputError
from tinymim_fast.evaluation.corruptions import ALEXNET_ERRORS, SEVERITIES
from tinymim_fast.files import whole_folder, write_text

MARKER = "corruptions.json"  # what a folder was made of
MIN_SIZE = 32  # pixels, the package's
QUALITY = 85


@dataclass(frozen=True)
class _Part:
    """One corruption at one severity: what a process is sent."""

    index: ImageIndex
    view: EvalView
    out: Path
    number: int  # of the corruption
    severity: int
    seed: int


def check_maker() -> None:
    """Refuse before any work where the package is missing.

    Raises:
        InputError: argument "make_corruptions".
    """
    if importlib.util.find_spec("imagecorruptions") is None:
        raise InputError(
            "needs the package imagecorruptions-imaug: pip install 'tinymim_fast[corruptions]'",
            argument="make_corruptions",
        )


def make_corruptions(
    index: ImageIndex, out: Path, view: EvalView, *, seed: int = 0, workers: int = 2, progress: Progress | None = None
) -> None:
    """Write each image at 15 corruptions and 5 severities.

    A folder that is there is kept, so that a call that was stopped goes on. Noise depends on (seed, corruption,
    severity, image), but for impulse noise and glass blur, whose generators the package lets nobody seed.

    Args:
        index: images with classes.
        out: folder to make.
        view: size of the images, and from which size they are cropped.
        seed: of the noise.
        workers: processes.
        progress: wraps the results, as tqdm does.

    Raises:
        InputError: `out` holds something else or can't be written, or images too small (argument "make_corruptions");
            an image that can't be decoded; or the package is missing.
    """
    check_maker()
    if view.img_size < MIN_SIZE:
        raise InputError(f"got {view.img_size} pixels a side, want {MIN_SIZE} or more", argument="make_corruptions")
    made_from = {
        "num_images": len(index),
        "root": str(index.root),
        "img_size": view.img_size,
        "resize_size": view.resize_size,
        "seed": seed,
    }
    try:
        _claim(out, json.dumps(made_from, indent=2) + "\n")
        parts = [
            _Part(index, view, out, number, severity, seed)
            for number, corruption in enumerate(ALEXNET_ERRORS)
            for severity in SEVERITIES
            if not (out / corruption / str(severity)).exists()
        ]
        if parts:
            for _ in in_parallel(_make_part, parts, workers, progress):
                pass
    except OSError as error:
        raise InputError(f"{out}: can't be written: {error}", argument="make_corruptions") from error


def _claim(out: Path, made_from: str) -> None:
    marker = out / MARKER
    if out.exists() and not marker.is_file() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists already; choose another folder or remove it", argument="make_corruptions")
    out.mkdir(parents=True, exist_ok=True)
    if not marker.is_file():
        write_text(marker, made_from)
    elif marker.read_text(encoding="utf-8") != made_from:
        raise InputError(f"{out}: holds other images' corruptions; choose another folder", argument="make_corruptions")


def _make_part(part: _Part) -> None:
    from imagecorruptions import corrupt

    corruption = list(ALEXNET_ERRORS)[part.number]
    with_parents = part.out / corruption / str(part.severity)
    with_parents.parent.mkdir(exist_ok=True)
    with whole_folder(with_parents) as folder:
        for sample in range(len(part.index)):
            pixels = np.asarray(_cropped(part.index.read_image(sample), part.view))
            np.random.seed([part.seed, part.number, part.severity, sample])
            corrupted = corrupt(pixels, corruption_name=corruption, severity=part.severity)
            file = folder / _name(part.index, sample)
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.uint8(corrupted)).save(file, format="JPEG", quality=QUALITY)


def _cropped(image: Image.Image, view: EvalView) -> Image.Image:
    image = F.resize(image, view.resize_size, interpolation=F.InterpolationMode(view.interpolation))
    return F.center_crop(image, view.img_size)


def _name(index: ImageIndex, sample: int) -> str:
    """Class and file, the file's name kept and made flat; another suffix stays, so that names stay different."""
    of_class, path = index.class_names[index.labels[sample]], index.paths[sample]
    name = path.removeprefix(f"{of_class}/").replace("/", "_")
    return f"{of_class}/{name}" if name.endswith(".JPEG") else f"{of_class}/{name}.JPEG"
