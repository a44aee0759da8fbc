"""Tiny classifiers on the disk, folders laid out as ImageNet's test sets are, and accuracies by a plain loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torchvision.transforms.functional as F
from PIL import Image

from support.programs import TINY
from tinymim_fast.data.drawn_images import DRAWN_CLASSES, draw_picture
from tinymim_fast.models.checkpoints import save_weights
from tinymim_fast.models.model_info import ModelInfo
from tinymim_fast.models.vit import create_vit, head_layout

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def save_classifier(folder: Path, num_classes: int, **info: object) -> torch.nn.Module:
    """An untrained classifier of 32-pixel images, as a fine-tuned checkpoint in `folder`, that tells images apart."""
    torch.manual_seed(0)
    kwargs = {**TINY, "num_classes": num_classes}
    vit = create_vit("vit_tiny_patch16_224", img_size=32, **kwargs).eval()
    if num_classes:
        torch.nn.init.normal_(vit.head.weight, std=1.0)
    for block in vit.blocks:  # timm's start leaves all images alike
        torch.nn.init.normal_(block.mlp.fc2.weight, std=0.3)
    folder.mkdir(parents=True, exist_ok=True)
    described = {"recipe": {"mean": MEAN.tolist(), "std": STD.tolist()}, **info}
    info = ModelInfo("vit_tiny_patch16_224", {**kwargs, "img_size": 32}, "fine-tuned", head_layout(vit), **described)
    save_weights(folder, vit.state_dict(), info)
    return vit


def write_images(root: Path, classes: Iterable[str], *, names: Mapping[str, str] | None = None) -> Path:
    """One JPEG in `root`/<class> for each class, 48 pixels high and 40 wide, which repeat after 32 classes."""
    import numpy as np

    drawn = []
    for number in range(32):
        picture = draw_picture(DRAWN_CLASSES[number % 16], 48, np.random.default_rng(number))
        drawn.append(Image.fromarray(picture[:, :40]))
    for number, name in enumerate(classes):
        folder = root / name
        folder.mkdir(parents=True)
        drawn[number % 32].save(folder / (names or {}).get(name, f"{number}.JPEG"), format="JPEG", quality=95)
    return root


@torch.inference_mode()
def logits_by_loop(model: torch.nn.Module, file: Path, *, img_size: int = 32, resize_size: int = 37) -> torch.Tensor:
    """Logits of one image as torchvision's users make them: resized, cropped, normalised, alone in its batch."""
    with Image.open(file) as image:
        pixels = F.resize(image.convert("RGB"), resize_size, interpolation=F.InterpolationMode.BICUBIC)
    view = F.to_tensor(F.center_crop(pixels, img_size))
    return model(((view - MEAN[:, None, None]) / STD[:, None, None])[None])[0]
