import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from tinymim_fast.data.draws import draw_views, epoch_order, uniforms
from tinymim_fast.data.views import TrainView

NUM_DRAWS = 4000
VIEW = TrainView(img_size=32)


def draw(height, width, n=NUM_DRAWS, **changes):
    sizes = np.tile(np.array([[height, width]], dtype=np.int32), (n, 1))
    return draw_views(sizes, np.arange(n), replace(VIEW, **changes), seed=0, epoch=0)


def assert_same_distribution(ours, theirs):
    """Two-sample Kolmogorov-Smirnov test at the 0.1 % level."""
    ours, theirs = np.sort(np.asarray(ours, dtype=float)), np.sort(np.asarray(theirs, dtype=float))
    at = np.concatenate([ours, theirs])
    gap = np.searchsorted(ours, at, "right") / len(ours) - np.searchsorted(theirs, at, "right") / len(theirs)
    limit = 1.95 * math.sqrt(1 / len(ours) + 1 / len(theirs))
    assert np.abs(gap).max() < limit, f"distance {np.abs(gap).max():.4f}, limit {limit:.4f}"


def test_uniforms_are_pinned():
    # a change here changes every run that is resumed across it
    assert epoch_order(8, seed=0, epoch=0).tolist() == [5, 7, 4, 0, 2, 6, 3, 1]
    np.testing.assert_array_equal(uniforms(1, 2, np.array([3]), 2)[0], [0.42833919571939116, 0.4768008249794259])


def test_uniforms_depend_on_their_own_sample_alone():
    alone = uniforms(5, 1, np.array([17]), 4)
    np.testing.assert_array_equal(uniforms(5, 1, np.arange(40), 4)[17:18], alone)
    np.testing.assert_array_equal(uniforms(5, 1, np.array([17]), 9)[:, :4], alone)
    for other in (
        uniforms(6, 1, np.array([17]), 4),
        uniforms(5, 2, np.array([17]), 4),
        uniforms(-5, 1, np.array([17]), 4),
    ):
        assert not np.isin(other, alone).any()


def test_uniforms_are_uniform_and_uncorrelated():
    u = uniforms(0, 0, np.arange(20000), 4)
    assert u.dtype == np.float64 and u.min() >= 0 and u.max() < 1
    for column in u.T:
        assert_same_distribution(column, (np.arange(20000) + 0.5) / 20000)
    across = np.corrcoef(np.column_stack([u[:-1], u[1:], uniforms(0, 1, np.arange(1, 20000), 4)]), rowvar=False)
    assert np.abs(across - np.eye(12)).max() < 5 / math.sqrt(20000)


def test_epoch_order_is_a_new_permutation_each_epoch():
    orders = [epoch_order(1000, seed, epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    for order in orders:
        assert sorted(order) == list(range(1000))
    for a, b in itertools.combinations(orders, 2):
        assert np.mean(a == b) < 0.01


def test_params_depend_on_their_own_sample_alone():
    sizes = np.random.default_rng(0).integers(50, 500, (30, 2))
    ids = np.arange(100, 130)
    whole = draw_views(sizes, ids, VIEW, seed=3, epoch=2)
    part = draw_views(sizes[[7, 3]], ids[[7, 3]], VIEW, seed=3, epoch=2)
    for name, values in vars(whole).items():
        np.testing.assert_array_equal(values[[7, 3]], getattr(part, name), err_msg=name)


@pytest.mark.parametrize("height, width", [(375, 500), (96, 96), (40, 200)], ids=["photo", "small", "often_falls_back"])
def test_crops_are_distributed_like_torchvisions(height, width):
    torch = pytest.importorskip("torch")
    crop = pytest.importorskip("torchvision.transforms").RandomResizedCrop
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([crop.get_params(image, VIEW.scale, VIEW.ratio) for _ in range(NUM_DRAWS)])
    p = draw(height, width)
    ours = np.column_stack([p.top, p.left, p.height, p.width])
    for measure in (
        *(lambda c, i=i: c[:, i] for i in range(4)),
        lambda c: c[:, 2] * c[:, 3],
        lambda c: c[:, 3] / c[:, 2],
    ):
        assert_same_distribution(measure(ours), measure(theirs))
    assert (p.top >= 0).all() and (p.top + p.height <= height).all()
    assert (p.left >= 0).all() and (p.left + p.width <= width).all()


def test_anchors_reach_every_position_evenly():
    p = draw(12, 12, scale=(0.6, 0.9), ratio=(1, 1))
    spare = 12 - p.height
    assert set(spare) == {1, 2, 3}
    for room in (1, 2, 3):
        for anchor in (p.top[spare == room], p.left[spare == room]):
            rates = np.bincount(anchor, minlength=room + 1) / len(anchor)
            assert rates == pytest.approx(1 / (room + 1), abs=4 * 0.5 / math.sqrt(len(anchor)))


@pytest.mark.parametrize("height, width", [(10, 1000), (1001, 10), (1, 1)])
def test_fallback_is_torchvisions(height, width):
    torch = pytest.importorskip("torch")
    crop = pytest.importorskip("torchvision.transforms").RandomResizedCrop
    theirs = crop.get_params(torch.empty(3, height, width), VIEW.scale, VIEW.ratio)
    p = draw(height, width, n=1)
    assert (p.top[0], p.left[0], p.height[0], p.width[0]) == tuple(theirs)


def test_flip_rate():
    for hflip in (0.0, 0.3, 1.0):
        assert draw(100, 100, hflip=hflip).flip.mean() == pytest.approx(hflip, abs=4 * 0.5 / math.sqrt(NUM_DRAWS))


def test_jitter_is_distributed_like_torchvisions():
    torch = pytest.importorskip("torch")
    jitter = pytest.importorskip("torchvision.transforms").ColorJitter(0.4, 0.2, 1.5)
    torch.manual_seed(0)
    theirs = [jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, None) for _ in range(NUM_DRAWS)]
    p = draw(100, 100, color_jitter=(0.4, 0.2, 1.5))
    for i in range(3):
        assert_same_distribution(p.jitter[:, i], [params[1 + i] for params in theirs])
    for order in itertools.permutations(range(3)):
        rate = (p.jitter_order == order).all(axis=1).mean()
        assert rate == pytest.approx(1 / 6, abs=4 * math.sqrt(1 / 6 * 5 / 6 / NUM_DRAWS)), order


def test_no_jitter_gives_factors_of_one():
    for strength in ((0, 0, 0), None):
        assert (draw(100, 100, n=10, color_jitter=strength).jitter == 1).all()
