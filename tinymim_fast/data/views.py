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
    """A random resized crop with a random flip, normalised: as it is, changed in its colours and shape, or both.

    What changes it is timm's: RandAugment, or, where that is not asked for, colour jitter.

    Args:
        img_size: side of the views, pixels.
        scale: range of the crop's share of the area.
        ratio: range of the crop's width / height, before resizing.
        hflip: probability of a horizontal flip of both views.
        color_jitter: brightness, contrast and saturation strengths of the changed view, as in torchvision's
            ColorJitter; None for none. As in timm, RandAugment takes its place.
        rand_augment: timm's RandAugment of the changed view, "rand-m9-mstd0.5-inc1"; None for none.
        clean: whether the unchanged view comes too, before the changed one.
        labels: whether the classes of the images come too, behind the views.
        repeats: changed views of an image in a row (repeated augmentation); an epoch then has 1 / repeats of the
            images.
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
    rand_augment: str | None = None
    clean: bool = True
    labels: bool = False
    repeats: int = 1
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
        """Views of each image: 2 where there are a clean and a changed one, else 1."""
        return 2 if self.clean and self.is_changed else 1

    @property
    def is_changed(self) -> bool:
        """Whether there is a view that is not the bare crop: RandAugment's or a jittered one."""
        return self.color_jitter is not None or self.rand_augment is not None

    @property
    def is_jittered(self) -> bool:
        """Whether the changed view is jittered: not where RandAugment takes jitter's place."""
        return self.color_jitter is not None and self.rand_augment is None

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
