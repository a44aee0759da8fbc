"""What a file's first and last bytes tell of an image, and decoding to RGB with PIL."""

from __future__ import annotations

import os
from enum import IntFlag
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from tinymim_fast.data.errors import ImageError

_FORMATS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".ppm": "PPM",
    ".bmp": "BMP",
    ".pgm": "PPM",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
}
IMG_EXTENSIONS = tuple(_FORMATS)  # torchvision's
_PNG_END = b"IEND\xaeB`\x82"


class Verdict(IntFlag):
    """What is wrong or odd about a file; 0 for nothing. Files of DAMAGED are left out, the others are trained on."""

    UNREADABLE = 1  # the system gives no bytes
    EMPTY = 2
    NON_IMAGE = 4
    TRUNCATED = 8
    HUGE = 16  # more pixels than PIL decodes
    CMYK = 32
    GREYSCALE = 64
    SIXTEEN_BIT = 128
    MISNAMED = 256  # such as a PNG called .JPEG
    UNSUPPORTED = 512  # a format of none of IMG_EXTENSIONS: DALI 2.4 crashed on GIF, AVIF, ICO and TGA called .jpg
    DAMAGED = UNREADABLE | EMPTY | NON_IMAGE | TRUNCATED | HUGE | UNSUPPORTED

    @property
    def title(self) -> str:
        return self.name.lower().replace("_", "-")


class Header(NamedTuple):
    """One file: size in pixels (0 where unknown) and in bytes, PIL's format and mode, `Verdict`, and why it is DAMAGED."""

    height: int = 0
    width: int = 0
    num_bytes: int = 0
    format: str = ""
    mode: str = ""
    verdict: int = 0
    reason: str = ""


def inspect_path(path: str) -> Header:
    """`inspect` of a file by its path."""
    try:
        with open(path, "rb") as file:
            return inspect(file, path)
    except OSError as error:
        return _damaged(Verdict.UNREADABLE, _say(error))


def inspect(file: BinaryIO, name: str) -> Header:
    """Read the header and the last bytes of an image file.

    A JPEG or PNG that does not end with its end-of-image marker, and each TIFF, is decoded: it is TRUNCATED where PIL
    says so.
    Truncation of other formats, and damage between the first and the last bytes, are not seen here.

    Args:
        file: opened, seekable.
        name: its file name, for its ending.
    """
    num_bytes = file.seek(0, os.SEEK_END)
    if num_bytes == 0:
        return _damaged(Verdict.EMPTY)
    file.seek(0)
    try:
        with Image.open(file) as image:
            height, width, mode = image.height, image.width, image.mode
            format = "JPEG" if image.format == "MPO" else image.format  # a JPEG with more pictures behind it
            is_deep = mode.startswith("I") or ";16" in str(image.tile)
    except Image.DecompressionBombError:
        return _damaged(Verdict.HUGE, f"more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels")
    except UnidentifiedImageError:
        return _damaged(Verdict.NON_IMAGE)
    except Exception as error:  # PIL's readers raise anything on damaged files
        return _damaged(Verdict.NON_IMAGE, _say(error))
    if format not in _FORMATS.values():
        return _damaged(Verdict.UNSUPPORTED, format)
    end = {"JPEG": b"\xff\xd9", "PNG": _PNG_END}.get(format, b"")
    file.seek(-len(end), os.SEEK_END)
    if file.read() != end or format == "TIFF":  # it is missing, or something follows it; a TIFF has none
        try:
            file.seek(0)
            if format == "PNG" and end not in file.read():  # PIL does not miss it, other decoders do
                raise OSError("image file is truncated")
            file.seek(0)
            with Image.open(file) as image:
                image.load()
        except Exception as error:
            return _damaged(Verdict.TRUNCATED, _say(error))
    verdict = Verdict(0)
    if is_deep:
        verdict |= Verdict.SIXTEEN_BIT
    if mode == "CMYK":
        verdict |= Verdict.CMYK
    if mode in ("1", "L", "LA", "La") or mode.startswith("I"):
        verdict |= Verdict.GREYSCALE
    if _FORMATS.get(os.path.splitext(name)[1].lower()) != format:
        verdict |= Verdict.MISNAMED
    return Header(height, width, num_bytes, format, mode, int(verdict))


def _damaged(verdict: Verdict, detail: str = "") -> Header:
    return Header(verdict=int(verdict), reason=f"{verdict.title}: {detail}" if detail else verdict.title)


def decode_rgb(file: str | BinaryIO, name: str) -> Image.Image:
    """Decode an image to RGB of 8 bits.

    Args:
        file: a path or an opened file.
        name: for the message.

    Raises:
        ImageError: it can't be decoded; names it.
    """
    try:
        with Image.open(file) as image:
            if image.mode.startswith("I"):  # PIL clips 16-bit grey levels at 255 instead of scaling them
                return Image.fromarray(np.rint(np.asarray(image) / 257).clip(0, 255).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except Exception as error:
        reason = _say(error)
        raise ImageError(f"got {name}, which can't be decoded: {reason}; replace or remove it", reason) from error


def _say(error: Exception) -> str:
    """One line without the name of a Python object."""
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
