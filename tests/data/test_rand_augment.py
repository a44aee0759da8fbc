"""RandAugment with draws from outside, against timm's own on the same draws."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment

from support.loaders import copies, train_loader
from tinymim_fast.data.rand_augment import RandAugment
from tinymim_fast.data.views import IMAGENET_MEAN

CONFIG = "rand-m9-mstd0.5-inc1"


def timm_policy(config):
    """As `timm.data.create_transform` makes it."""
    fill = tuple(round(255 * m) for m in IMAGENET_MEAN)
    return auto_augment.rand_augment_transform(config, {"img_mean": fill, "interpolation": Image.BICUBIC})


class Dictated(random.Random):
    """Python's generator, whose numbers are given: what `AugmentOp` asks for, in its order."""

    def __init__(self, uniforms, normal):
        super().__init__()
        self.uniforms, self.normal = list(uniforms), normal

    def random(self):
        return self.uniforms.pop(0)

    def gauss(self, mu, sigma):
        return mu + sigma * self.normal

    def uniform(self, a, b):
        return a + (b - a) * self.random()


def by_timm(policy, image, rows, monkeypatch):
    """timm's operations with each layer's uniforms (which, whether, how, way) behind their random calls."""
    which, whether, how, way = rows.reshape(-1, 4).T
    chosen = [policy.ops[i] for i in np.floor(which * len(policy.ops)).astype(int)]
    posterize = auto_augment.ImageOps.posterize  # to keep no bit is an error in newer Pillows, and black in older ones
    monkeypatch.setattr(
        auto_augment.ImageOps, "posterize", lambda i, bits: posterize(i, bits) if bits > 0 else Image.new("RGB", i.size)
    )
    normals = torch.special.ndtri(torch.from_numpy(how.copy())).tolist()
    spread = policy.ops[0].magnitude_std == float("inf")
    for op, use, strength, normal, sign in zip(chosen, whether, how, normals, way, strict=True):
        drawn = Dictated([use, strength, sign] if spread else [use, sign], normal)
        monkeypatch.setattr(auto_augment, "random", drawn)
        image = op(image)
    return image


@pytest.mark.parametrize("config", [CONFIG, "rand-m10", "rand-m7-n3-mstd101-p0.9", "rand-m12-mmax15-mstd1-inc1"])
def test_pictures_are_timms_on_the_same_draws(config, monkeypatch):
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((40, 40), Image.BICUBIC)
    ours, policy = RandAugment(config, IMAGENET_MEAN), timm_policy(config)
    uniforms = generator.random((150, ours.num_uniforms))
    operations, arguments = ours.draw(uniforms)
    assert set(operations.ravel().tolist()) == set(range(-1, 15)), "every operation, and none"
    changed = 0
    for rows, which, how in zip(uniforms, operations, arguments, strict=True):
        found = ours.apply(image, which, how)
        with monkeypatch.context() as patch:
            want = by_timm(policy, image, rows, patch)
        assert found.tobytes() == want.tobytes(), [ours.names[i] for i in which if i >= 0]
        changed += found.tobytes() != image.tobytes()
    assert changed > 75


def test_weighted_operations_come_as_often_as_timm_says_and_never_twice():
    ours = RandAugment("rand-m9-p1-tweights-inc1", IMAGENET_MEAN)
    operations, _ = ours.draw(np.random.default_rng(0).random((20_000, ours.num_uniforms)))
    weights = np.array(list(auto_augment._RAND_WEIGHTED_0.values()))
    share = np.bincount(operations[:, 0], minlength=15) / len(operations)
    np.testing.assert_allclose(share, weights / weights.sum(), atol=0.01)
    assert (operations[:, 0] != operations[:, 1]).all()


def test_global_generators_are_left_alone():
    ours = RandAugment(CONFIG, IMAGENET_MEAN)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    operations, arguments = ours.draw(np.random.default_rng(0).random((50, ours.num_uniforms)))
    image = Image.new("RGB", (16, 16), (200, 30, 60))
    for row in range(50):
        ours.apply(image, operations[row], arguments[row])
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_augmented_views_are_a_function_of_seed_epoch_and_sample(drawn_index, loader_name):
    options = {"rand_augment": CONFIG, "clean": False, "color_jitter": None}
    with train_loader(drawn_index, loader_name, batch_size=12, **options) as loader:
        whole, later = copies(loader.batches(0, 5)), copies(loader.batches(3, 2))
        assert torch.equal(whole[3], later[0]) and torch.equal(whole[4], later[1])  # over an epoch's end
    with train_loader(drawn_index, loader_name, batch_size=6, world_size=2, rank=1, workers=1, **options) as loader:
        assert torch.equal(copies(loader.batches(0, 1))[0][0], whole[0][0, 6:])


def test_both_loaders_give_timms_pictures(drawn_index):
    """On a CPU, where PIL makes them for both: they differ as the bare crops do."""
    pytest.importorskip("nvidia.dali")
    views = {}
    for loader_name in ("dali", "torchvision"):
        for augment in (None, CONFIG):
            options = {"rand_augment": augment, "clean": False, "color_jitter": None}
            with train_loader(drawn_index, loader_name, **options) as loader:
                views[loader_name, augment] = torch.cat([batch for (batch,) in loader.batches(0, 3)])
    bare, augmented = ((views["dali", a] - views["torchvision", a]).abs().mean() for a in (None, CONFIG))
    assert augmented < 3 * bare + 1e-3
    assert (views["dali", CONFIG] - views["dali", None]).abs().mean() > 0.2


def test_labels_come_with_their_images(drawn_index, loader_name):
    options = {"labels": True, "color_jitter": None, "batch_size": 12}
    with train_loader(drawn_index, loader_name, **options) as loader:
        batches = list(loader.batches(0, 4))
    plan = loader.plan
    for number, (images, labels) in enumerate(batches):
        assert images.shape == (12, 3, 64, 64) and labels.dtype == torch.int64
        assert labels.tolist() == drawn_index.labels[plan.sample_ids(number)].tolist()
    with train_loader(drawn_index, loader_name, labels=True, batch_size=12) as loader:
        clean, changed, labels = next(loader.batches(0, 1))
        assert torch.equal(clean, batches[0][0]) and not torch.equal(changed, clean)
        assert torch.equal(labels, batches[0][1])


def test_repeated_augmentation_gives_an_image_several_different_views(drawn_index, loader_name):
    options = {"rand_augment": CONFIG, "clean": False, "labels": True, "repeats": 3, "batch_size": 12}
    with train_loader(drawn_index, loader_name, **options) as loader:
        plan = loader.plan
        images, labels = next(loader.batches(0, 1))
        epoch = np.concatenate([plan.sample_ids(number) for number in range(plan.steps_per_epoch)])
    assert (epoch[0::3] == epoch[1::3]).all() and (epoch[0::3] == epoch[2::3]).all()
    assert len(set(epoch.tolist())) == len(drawn_index) // 3
    assert labels[0] == labels[1] == labels[2]
    assert not torch.equal(images[0], images[1]) and not torch.equal(images[1], images[2])
