"""Data: folder index, reproducible augmentation, and loaders that apply it with DALI or torchvision."""

from tinymim_fast.data.errors import DataError
from tinymim_fast.data.index import ImageFolderIndex, scan_image_folder
from tinymim_fast.data.loader import EvalLoader, TrainLoader, build_eval_loader, build_loader
from tinymim_fast.data.sample import draw_sample_folder

__all__ = [
    "DataError",
    "EvalLoader",
    "ImageFolderIndex",
    "TrainLoader",
    "build_eval_loader",
    "build_loader",
    "draw_sample_folder",
    "scan_image_folder",
]
