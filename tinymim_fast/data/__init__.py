"""Data: the index of images, reproducible random views, and loaders that make them with DALI or torchvision."""

from tinymim_fast.data.drawn_images import draw_image_folder
from tinymim_fast.data.errors import DataError
from tinymim_fast.data.index import ImageIndex
from tinymim_fast.data.loader import EvalLoader, TrainLoader, build_eval_loader, build_loader

__all__ = [
    "DataError",
    "EvalLoader",
    "ImageIndex",
    "TrainLoader",
    "build_eval_loader",
    "build_loader",
    "draw_image_folder",
    "find_images",
    "scan_images",
]


def __getattr__(name: str):
    """`find_images` and `scan_images`, when they are asked for: scan.py is a program too, started by its name."""
    if name in ("find_images", "scan_images"):
        from tinymim_fast.data import scan

        return getattr(scan, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
