"""What DALI's own operations, which a GPU runs, make of timm's RandAugment: against PIL's pictures, one by one."""

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali")
pytest.importorskip("torchvision")

from support.loaders import train_loader
from tinymim_fast.data import dali_loader as dali
from tinymim_fast.data.dali_source import KINDS
from tinymim_fast.data.rand_augment import RandAugment
from tinymim_fast.data.views import IMAGENET_MEAN, IMAGENET_STD

CONFIG = "rand-m9-n1-p1-mstd0.5-inc1"
# Mean difference from PIL, of 255, on drawn pictures: about half as much again as was found. The two loaders' crops
# differ by 0.03.
LIMITS = {
    **dict.fromkeys(("Invert", "Posterize", "Solarize", "SolarizeAdd", "Brightness"), 0.06),
    **dict.fromkeys(("Contrast", "Color"), 0.3),
    **dict.fromkeys(("AutoContrast", "Sharpness"), 1.0),
    **dict.fromkeys(("TranslateXRel", "TranslateYRel"), 1.6),
    **dict.fromkeys(("ShearX", "ShearY"), 2.2),
    "Rotate": 3.4,
    "Equalize": 6.0,
}


@pytest.fixture
def operations_of_a_gpu(monkeypatch):
    """DALI's graph with the operations that it has on a GPU, run on the CPU."""
    original = dali._rand_augment
    monkeypatch.setattr(dali, "_rand_augment", lambda image, rows, plan, threads: original(image, rows, plan, None))


def one_operation(monkeypatch, name):
    """Every image gets this operation, in the one layer."""
    choose = RandAugment._choose

    def always(self, u):
        number = [n.removesuffix("Increasing") for n in self.names].index(name)
        return np.full_like(choose(self, u), number)

    monkeypatch.setattr(RandAugment, "_choose", always)


def views(index, loader_name):
    options = {"rand_augment": CONFIG, "clean": False, "color_jitter": None, "workers": 1}
    with train_loader(index, loader_name, **options) as loader:
        return torch.cat([images for (images,) in loader.batches(0, 3)])


@pytest.mark.parametrize("name", LIMITS)
def test_an_operation_is_pils_up_to_what_the_page_says(drawn_index, operations_of_a_gpu, monkeypatch, name):
    one_operation(monkeypatch, name)
    difference = (views(drawn_index, "dali") - views(drawn_index, "torchvision")).abs()
    mean = float((difference * 255 * torch.tensor(IMAGENET_STD).view(3, 1, 1)).mean())
    assert mean < LIMITS[name], f"{name}: {mean:.2f} of 255"


def test_every_operation_of_timms_sets_has_a_kind():
    names = {n for c in ("rand-m9", CONFIG, "rand-m9-t3aw") for n in RandAugment(c, IMAGENET_MEAN).names}
    moves = {"Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"}
    assert {n.removesuffix("Increasing") for n in names} - set(KINDS) == moves
