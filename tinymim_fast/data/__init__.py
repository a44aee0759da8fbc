"""Data: the index of images, reproducible random views, and loaders that make them with DALI or torchvision."""

from tinymim_fast.data.drawn_images import draw_image_folder
from tinymim_fast.data.errors import DataError
from tinymim_fast.data.index import ImageIndex
from tinymim_fast.data.loader import EvalLoader, TrainLoader, build_eval_loader, build_loader
from tinymim_fast.data.scan import find_images, scan_images

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
