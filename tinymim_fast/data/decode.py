"""Decoding to RGB of 8 bits with PIL: for the torchvision loader, and for what DALI can't take."""

from __future__ import annotations

import os
import warnings
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from tinymim_fast.data.errors import ImageError

MAX_IMAGE_PIXELS = 89_478_485  # where PIL begins to warn of a decompression bomb; it decodes no more than twice as many
FORMATS = (
    "JPEG",
    "PNG",
    "PPM",
    "BMP",
    "TIFF",
    "WEBP",
)  # torchvision's endings; a JPEG with more pictures behind it is one
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # the limit is ours


class RangeError(ValueError):
    """Values of which no file tells what is black and what is white."""


def decode_rgb(file: str | BinaryIO, name: str, size: tuple[int, int] | None = None) -> Image.Image:
    """Decode an image to RGB of 8 bits.

    Args:
        file: a path or an opened file.
        name: for the message.
        size: height and width in pixels, that it must have before it is decoded; None takes any.

    Raises:
        ImageError: it can't be decoded or has another size; names it.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            if size is not None and (image.height, image.width) != size:
                found = f"{image.height} x {image.width} pixels"
                raise ImageError(
                    f"got {name} of {found}, want the indexed {size[0]} x {size[1]}; it changed since it was scanned: "
                    "scan again",
                    f"{found}, not the indexed {size[0]} x {size[1]}",
                )
            return to_rgb(image)
    except ImageError:
        raise
    except Exception as error:  # PIL's readers raise anything on damaged files
        reason = one_line(error)
        raise ImageError(f"got {name}, which can't be decoded: {reason}; replace or remove it", reason) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened image as RGB of 8 bits, its values scaled by the range that the file gives them.

    8 bits: as they are. 16 bits: of 65,535. Netpbm: of the file's own maximum. Floating point: of 1 where none is
    larger, else of 255. CMYK, Lab, YCbCr, palettes: PIL's conversion. Alpha is dropped.

    Raises:
        RangeError: integers of 32 bits, floating point beyond 0 to 255.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image.convert("RGB")
    values = np.asarray(image)
    if image.mode == "F":
        low, high = float(values.min()), float(values.max())
        if not 0 <= low <= high <= 255:  # also NaN
            raise RangeError(f"floating-point values from {low:g} to {high:g}, want 0 to 1 or 0 to 255")
        top = 1 if high <= 1 else 255
    elif image.mode == "I" and image.format not in ("PPM", "PNG"):  # there, PIL has scaled to 16 bits
        raise RangeError("integers of 32 bits, whose range no file tells; store 8 or 16 bits")
    else:
        top = 65535
    return Image.fromarray(np.rint(values / (top / 255)).clip(0, 255).astype(np.uint8)).convert("RGB")


def one_line(error: Exception) -> str:
    """What an error says, on one line, without the name of a Python object."""
    if isinstance(error, UnidentifiedImageError):
        return "no image of a known type"
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno) if error.strerror is None else error.strerror
    return " ".join((str(error) or type(error).__name__).split())
