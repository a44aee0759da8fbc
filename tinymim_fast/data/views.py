"""What is made of an image before a model sees it: frozen, and passed whole from the configuration to the loader."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tinymim_fast.data.errors import DataError

INTERPOLATIONS = ("bicubic", "bilinear", "lanczos", "box", "hamming", "nearest")  # PIL's, by timm's names
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Normalisation = tuple[tuple[float, float, float], tuple[float, float, float]]  # mean and standard deviation, of 1


@dataclass(frozen=True, kw_only=True)
class TrainView:
    """A random resized crop with a random flip, normalised; and, with `color_jitter`, the same crop jittered as a
    second view.

    Args:
        img_size: side of the views, pixels.
        scale: range of the crop's share of the area.
        ratio: range of the crop's width / height, before resizing.
        hflip: probability of a horizontal flip of both views.
        color_jitter: brightness, contrast and saturation strengths of the second view, as in torchvision's
            ColorJitter; None for one view.
        mean: per channel, of 1.
        std: per channel, of 1.
        teacher_mean: of the first of two views, the teacher's; None: as `mean`.
        teacher_std: of the first of two views; None: as `std`.
        student_img_size: side of the second of two views, pixels; None: as `img_size`.
        interpolation: of the resizing, one of `INTERPOLATIONS`.
        dtype: float32 or float16.
    """

    img_size: int
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    color_jitter: tuple[float, float, float] | None = (0.4, 0.4, 0.4)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    teacher_mean: tuple[float, float, float] | None = None
    teacher_std: tuple[float, float, float] | None = None
    student_img_size: int | None = None
    interpolation: str = "bicubic"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        _check_interpolation(self.interpolation)

    @property
    def num_views(self) -> int:
        """Views of each image: 2 with colour jitter, else 1."""
        return 1 if self.color_jitter is None else 2

    @property
    def sizes(self) -> tuple[int, ...]:
        """Side of each view, pixels."""
        return (self.img_size, self.student_img_size or self.img_size)[: self.num_views]

    @property
    def normalisations(self) -> tuple[Normalisation, ...]:
        """Mean and standard deviation of each view."""
        own = self.mean, self.std
        if self.num_views == 1:
            return (own,)
        return (self.teacher_mean or self.mean, self.teacher_std or self.std), own


@dataclass(frozen=True, kw_only=True)
class EvalView:
    """The short side resized (antialiased), the centre cropped, normalised.

    Args:
        img_size: side of the crop, pixels.
        resize_size: length of the short side after resizing, pixels; at least `img_size`.
        mean: per channel, of 1.
        std: per channel, of 1.
        interpolation: of the resizing, one of `INTERPOLATIONS`.
        dtype: float32 or float16.

    Raises:
        DataError: the crop is larger than the resized image, or there is no such interpolation.
    """

    img_size: int
    resize_size: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: str = "bicubic"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        _check_interpolation(self.interpolation)
        if self.resize_size < self.img_size:
            raise DataError(f"got {self.resize_size}, want at least img_size, {self.img_size}", argument="resize_size")

    @property
    def normalisations(self) -> tuple[Normalisation, ...]:
        """Mean and standard deviation of the one view."""
        return ((self.mean, self.std),)


def _check_interpolation(name: str) -> None:
    if name not in INTERPOLATIONS:
        raise DataError(f"got {name}, want one of {', '.join(INTERPOLATIONS)}", argument="interpolation")
