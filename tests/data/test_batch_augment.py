"""Random erasing and Mixup as functions of (seed, batch, rank), against timm's own calls."""

import random

import numpy as np
import pytest
import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing

from tinymim_fast.data.batch_augment import BatchAugment


def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, 16, 16, generator=generator), torch.arange(6)


def augment(seed=3, rank=0, mode="batch", **mixup):
    mixing = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.1, "num_classes": 10, "mode": mode, **mixup}
    return BatchAugment(RandomErasing(1.0, mode="pixel", device="cpu"), Mixup(**mixing), seed=seed, rank=rank)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_images_and_targets_are_timms(mode):
    """timm's two calls one after the other, its generators started as ours are."""
    for number in range(8):
        images, targets = augment(mode=mode)(batch(), number)
        words = np.random.SeedSequence([3, number, 0]).generate_state(3).tolist()
        random.seed(words[0])
        np.random.seed(words[1])
        torch.manual_seed(words[2])
        plain, labels = batch()
        mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=10, mode=mode)
        want, want_targets = mixup(RandomErasing(1.0, mode="pixel", device="cpu")(plain), labels)
        assert torch.equal(images, want) and torch.equal(targets, want_targets)
        assert targets.dtype == torch.float32
        torch.testing.assert_close(targets.sum(1), torch.ones(6))


def test_the_targets_are_the_formula():
    """Mixup alone: the share that the first image keeps is that of its class, in fp64, smoothing spread over all."""
    images, labels = batch()
    mixing = BatchAugment(None, Mixup(mixup_alpha=0.8, label_smoothing=0.1, num_classes=10), seed=0, rank=0)
    mixed, targets = mixing((images, labels), 5)
    x, other, y = images[0].double(), images[5].double(), mixed[0].double()
    share = float(((y - other) * (x - other)).sum() / (x - other).square().sum())
    torch.testing.assert_close(targets, mixup_target(labels, 10, share, 0.1), rtol=1e-4, atol=1e-5)
    assert 0 < share < 1
    np.testing.assert_allclose(float(targets[0, 0]), 0.9 * share + 0.01, rtol=1e-4)
    np.testing.assert_allclose(float(targets[0, 5]), 0.9 * (1 - share) + 0.01, rtol=1e-4)


def test_a_function_of_seed_batch_and_rank():
    images, _ = augment()(batch(), 7)
    assert torch.equal(augment()(batch(), 7)[0], images)
    for other in (augment(seed=4)(batch(), 7), augment()(batch(), 8), augment(rank=1)(batch(), 7)):
        assert not torch.equal(other[0], images)


def test_generators_and_the_loaders_images_are_left_alone():
    views = batch()
    kept = [view.clone() for view in views]
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    augment()(views, 1)
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert all(torch.equal(view, was) for view, was in zip(views, kept, strict=True))


def test_without_either_nothing_happens():
    views = batch()
    images, labels = BatchAugment(None, None, seed=0, rank=0)(views, 0)
    assert images is views[0] and labels is views[1]
