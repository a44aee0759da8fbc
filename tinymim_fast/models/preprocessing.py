"""What a model expects of its images, and whether a run or an evaluation gives it that."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from tinymim_fast.errors import InputError
from tinymim_fast.models.architecture import shown

logger = logging.getLogger("tinymim_fast")
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "box", "hamming", "random")


@dataclass(frozen=True)
class Preprocessing:
    """How a model's images were made.

    Args:
        mean: per channel, of 1.
        std: per channel, of 1.
        crop_pct: side of the centre crop per short side of the resized image, in evaluation.
        interpolation: of the resizing, by timm's name.
    """

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    crop_pct: float = 224 / 256
    interpolation: str = "bicubic"

    def resize_size(self, img_size: int) -> int:
        """Short side after resizing, pixels, from which `img_size` is cropped."""
        return max(img_size, round(img_size / self.crop_pct))

    def differences(self, mean: tuple[float, ...], std: tuple[float, ...]) -> list[str]:
        """What of `mean` and `std` is not this model's, as "mean 0.5 0.5 0.5, here 0.485 0.456 0.406"."""
        given = {"mean": mean, "std": std}
        return [
            f"{name} {_spaced(getattr(self, name))}, here {_spaced(values)}"
            for name, values in given.items()
            if any(not math.isclose(a, b, abs_tol=1e-3) for a, b in zip(getattr(self, name), values, strict=True))
        ]

    @classmethod
    def from_config(cls, config: Any, path: object) -> Preprocessing | None:
        """From what a file says (timm's `pretrained_cfg`, this package's recipes); None where it says nothing of it.

        Raises:
            InputError: values that can't be, argument "source".
        """
        if not isinstance(config, Mapping):
            return None
        config = _of_1(config, path)
        given = {f.name: config[f.name] for f in fields(cls) if config.get(f.name) is not None}
        for name, value in given.items():
            if not _possible(name, value):
                raise InputError(f"{path}: says {name} {shown(value)}, which can't be", argument="source")
            given[name] = tuple(map(float, value)) if name in ("mean", "std") else value
        return cls(**given) if "mean" in given and "std" in given else None


def _of_1(config: Mapping[str, Any], path: object) -> Mapping[str, Any]:
    """The same, with a mean and standard deviation of 255 divided by it."""
    values = [config.get("mean"), config.get("std")]
    of_255 = all(isinstance(v, (list, tuple)) and _possible("mean", v) and 1 < max(v) <= 255 for v in values)
    if not of_255:
        return config
    logger.warning("%s: its mean and std are of 255: divided by 255", path)
    return {**config, **{name: [x / 255 for x in config[name]] for name in ("mean", "std")}}


def _possible(name: str, value: Any) -> bool:
    if name == "interpolation":
        return value in INTERPOLATIONS if isinstance(value, str) else False
    values = value if isinstance(value, (list, tuple)) else [value]
    if any(type(v) not in (int, float) or not math.isfinite(v) for v in values):
        return False
    if name == "crop_pct":
        return values == [value] and 0 < value <= 2
    return len(values) == 3 and values != [value] and (name == "mean" or min(values) > 0)


def _spaced(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4g}" for value in values)
