"""What a file's first and last bytes tell of an image."""

from __future__ import annotations

import os
from enum import IntFlag
from typing import BinaryIO, NamedTuple

from PIL import Image, UnidentifiedImageError

from tinymim_fast.data.decode import FORMATS, MAX_IMAGE_PIXELS, RangeError, one_line, to_rgb
from tinymim_fast.data.stored import open_regular

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
    """What is wrong or odd about a file; 0 for nothing. Files of DAMAGED are left out, those of NO_RANGE replaced."""

    UNREADABLE = 1  # the system gives no bytes
    EMPTY = 2
    NON_IMAGE = 4
    TRUNCATED = 8
    HUGE = 16  # more pixels than are decoded
    CMYK = 32
    GREYSCALE = 64
    SIXTEEN_BIT = 128
    MISNAMED = 256  # such as a PNG called .JPEG
    UNSUPPORTED = 512  # a format of none of IMG_EXTENSIONS
    UNLABELLED = 1024  # in shards where others have a label
    NO_RANGE = 2048  # integers of 32 bits, floating point beyond 0 to 255: no loader takes them, another image does
    DAMAGED = UNREADABLE | EMPTY | NON_IMAGE | TRUNCATED | HUGE | UNSUPPORTED | UNLABELLED

    @property
    def title(self) -> str:
        """As it is printed: "non-image"."""
        return self.name.lower().replace("_", "-")


class Header(NamedTuple):
    """One file: size in pixels (0 where unknown) and in bytes, `Verdict`, and why it is DAMAGED."""

    height: int = 0
    width: int = 0
    num_bytes: int = 0
    verdict: int = 0
    reason: str = ""


def inspect_path(path: str, max_pixels: int = MAX_IMAGE_PIXELS) -> Header:
    """`inspect` of a file by its path; one that is no regular file is unreadable, and not waited for."""
    try:
        with open(open_regular(path), "rb") as file:
            return inspect(file, path, max_pixels)
    except OSError as error:
        return damaged(Verdict.UNREADABLE, one_line(error))


def inspect(file: BinaryIO, name: str, max_pixels: int = MAX_IMAGE_PIXELS) -> Header:
    """Read the header and the last bytes of an image file.

    A JPEG or PNG that does not end with its end-of-image marker, each TIFF, and each image of floating point is
    decoded: TRUNCATED where PIL says so, NO_RANGE where its values have none that is known. Truncation of other
    formats, and damage between the first and the last bytes, are not seen here.

    Args:
        file: opened, seekable.
        name: its file name, for its ending.
        max_pixels: an image of more is HUGE.
    """
    num_bytes = file.seek(0, os.SEEK_END)
    if num_bytes == 0:
        return damaged(Verdict.EMPTY)
    if num_bytes > max(16 * max_pixels, 1 << 26):  # 8 bytes a pixel are the most that is common
        return damaged(Verdict.HUGE, f"{num_bytes:,} bytes")
    file.seek(0)
    try:
        with Image.open(file) as image:
            height, width, mode = image.height, image.width, image.mode
            format = "JPEG" if image.format == "MPO" else image.format  # a JPEG with more pictures behind it
            is_deep = mode.startswith("I") or ";16" in str(image.tile)
    except Image.DecompressionBombError:
        return damaged(Verdict.HUGE, f"more than {max_pixels:,} pixels")
    except UnidentifiedImageError:
        return damaged(Verdict.NON_IMAGE)
    except Exception as error:  # PIL's readers raise anything on damaged files
        return damaged(Verdict.NON_IMAGE, one_line(error))
    if height * width > max_pixels:
        return damaged(Verdict.HUGE, f"{width} x {height}, more than {max_pixels:,} pixels")
    if format not in FORMATS:
        return damaged(Verdict.UNSUPPORTED, format)
    end = {"JPEG": b"\xff\xd9", "PNG": _PNG_END}.get(format, b"")
    file.seek(-len(end), os.SEEK_END)
    verdict = Verdict(0)
    # the end is missing, or something follows it; a TIFF has none
    if file.read() != end or format == "TIFF" or mode == "F":
        try:
            file.seek(0)
            if format == "PNG" and end not in file.read():  # PIL does not miss it, other decoders do
                raise OSError("image file is truncated")
            file.seek(0)
            with Image.open(file) as image:
                image.load()
                to_rgb(image)
        except RangeError:
            verdict |= Verdict.NO_RANGE
        except Exception as error:
            return damaged(Verdict.TRUNCATED, one_line(error))
    if is_deep:
        verdict |= Verdict.SIXTEEN_BIT
    if mode == "CMYK":
        verdict |= Verdict.CMYK
    if mode in ("1", "L", "LA", "La") or mode.startswith("I"):
        verdict |= Verdict.GREYSCALE
    if _FORMATS.get(os.path.splitext(name)[1].lower()) != format:
        verdict |= Verdict.MISNAMED
    return Header(height, width, num_bytes, int(verdict))


def damaged(verdict: Verdict, detail: str = "") -> Header:
    """The header of a file that is left out, with its reason: the verdict, and what more there is to say."""
    return Header(verdict=int(verdict), reason=f"{verdict.title}: {detail}" if detail else verdict.title)
