import dataclasses
import logging
import multiprocessing
import os

import numpy as np
import pytest
import torch
from PIL import Image

from support.loaders import copies, eval_loader, train_loader
from tinymim_fast.data import DataError, scan_images
from tinymim_fast.data.views import IMAGENET_MEAN, IMAGENET_STD

PER_UNIT = 255 * torch.tensor(IMAGENET_STD).view(3, 1, 1)  # normalised -> 0..255

# Difference between the loaders' views, 0..255: mean and 99th percentile, teacher's and student's. On a GPU, DALI does
# not round between its two resize passes as PIL does: 0.18 and 1 on photographs, 0.25 and 2 after jitter. On the CPU
# PyTorch's resize does: 0.04 and 1, 0.08 and 1. A wrong anchor, filter or order costs more than 1.
LIMITS = {"gpu": ((0.4, 2), (0.6, 3)), "cpu": ((0.15, 1), (0.3, 2))}

DEVICES = [
    "cpu",
    pytest.param(
        "cuda:0",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
    ),
]


def mean_difference(a, b):
    """Per image, in units of 0..255."""
    return ((a - b).abs() * PER_UNIT).mean(dim=(-3, -2, -1))


def counts_by_difference(a, b):
    """(256,) values that differ by so much, in units of 0..255."""
    return ((a - b).abs() * PER_UNIT).round().to(torch.uint8).flatten().bincount(minlength=256)


def p99(counts):
    return int((counts.cumsum(0) < 0.99 * counts.sum()).sum())


@pytest.mark.parametrize("device", DEVICES)
def test_batch_contract(drawn_index, loader_name, device):
    with train_loader(drawn_index, loader_name, device=device) as loader:
        assert loader.steps_per_epoch == 6
        batches = list(loader.batches(0, 2))
        assert len(batches) == 2
        for views in batches:
            assert isinstance(views, tuple) and len(views) == 2
            for view in views:
                assert view.shape == (8, 3, 64, 64) and view.dtype == torch.float32
                assert view.device == torch.device(device) and view.is_contiguous()
                values = view.cpu() * PER_UNIT + 255 * torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
                assert values.min() > -0.01 and values.max() < 255.01 and values.std() > 10


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("start", [4, 6], ids=["inside_an_epoch", "at_an_epochs_start"])
def test_a_later_start_gives_the_same_batches(drawn_index, loader_name, device, start):
    with train_loader(drawn_index, loader_name, device=device) as loader:  # 6 steps an epoch
        whole, tail = copies(loader.batches(0, 14)), copies(loader.batches(start, 14 - start))
        assert len(whole) == 14 and len(tail) == 14 - start
        for a, b in zip(whole[start:], tail):
            assert torch.equal(a, b)
        assert not torch.equal(whole[0], whole[6])


def test_batches_stay_valid_while_more_are_made(drawn_index, loader_name):
    with train_loader(drawn_index, loader_name) as loader:
        kept, at_once = [], []
        for views in loader.batches(0, 12):
            kept.append(views)
            at_once.append([view.clone() for view in views])
    for views, clones in zip(kept, at_once):
        assert all(torch.equal(view, clone) for view, clone in zip(views, clones))


def test_ranks_and_accumulation_share_the_global_batch(drawn_index, loader_name):
    with train_loader(drawn_index, loader_name, batch_size=12) as loader:
        whole = copies(loader.batches(3, 2))  # over an epoch's end
    parts = []
    for rank in range(3):
        with train_loader(
            drawn_index, loader_name, batch_size=2, rank=rank, world_size=3, accumulation_steps=2, workers=1
        ) as loader:
            parts.append(copies(loader.batches(3, 2)))
    for step in range(2):
        together = torch.cat([parts[rank][2 * step + micro] for micro in range(2) for rank in range(3)], dim=1)
        assert torch.equal(together, whole[step])


def test_workers_and_prefetch_change_nothing(drawn_index, loader_name):
    with (
        train_loader(drawn_index, loader_name, workers=0, prefetch=1) as a,
        train_loader(drawn_index, loader_name, workers=2, prefetch=3) as b,
    ):
        for x, y in zip(copies(a.batches(5, 3)), copies(b.batches(5, 3))):
            assert torch.equal(x, y)


def test_without_jitter_both_views_are_equal(drawn_index, loader_name):
    with train_loader(drawn_index, loader_name, color_jitter=(0, 0, 0)) as loader:
        for teacher_view, student_view in loader.batches(0, 2):
            assert torch.equal(teacher_view, student_view)


def test_each_view_has_its_own_mean_and_std(drawn_index, loader_name):
    """Against the views of one mean and standard deviation, undone and done anew."""
    teacher = {"teacher_mean": (0.5, 0.4, 0.3), "teacher_std": (0.5, 0.25, 0.125)}
    mean, std, mean_t, std_t = (
        torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD, *teacher.values())
    )
    with train_loader(drawn_index, loader_name) as one, train_loader(drawn_index, loader_name, **teacher) as two:
        for (teacher_view, student_view), (own, same) in zip(one.batches(0, 2), two.batches(0, 2)):
            assert torch.equal(student_view, same)
            torch.testing.assert_close(own, (teacher_view * std + mean - mean_t) / std_t, rtol=0, atol=1e-5)


def test_the_students_view_may_have_another_size(drawn_index, loader_name):
    """Each view is that of a loader whose views have its size: the same crops, flips and jitter."""
    with (
        train_loader(drawn_index, loader_name, student_img_size=80) as both,
        train_loader(drawn_index, loader_name) as of_teacher,
        train_loader(drawn_index, loader_name, img_size=80) as of_student,
    ):
        for found, first, second in zip(both.batches(0, 2), of_teacher.batches(0, 2), of_student.batches(0, 2)):
            assert torch.equal(found[0], first[0]) and torch.equal(found[1], second[1])
            assert found[1].shape[-2:] == (80, 80)


@pytest.mark.parametrize("interpolation", ["bilinear", "lanczos", "box", "hamming", "nearest"])
def test_interpolations_are_pils(drawn_index, loader_name, interpolation):
    """In training, whole images resized; and in evaluation: both against PIL, and others than bicubic."""
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0, "color_jitter": None, "workers": 0}
    how, size = Image.Resampling[interpolation.upper()], 40

    def by_pil(sample_ids, resampling=how):
        images = [drawn_index.read_image(i).resize((size, size), resampling) for i in sample_ids.tolist()]
        pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]) / 255
        return (pixels - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)

    with train_loader(drawn_index, loader_name, img_size=size, interpolation=interpolation, **whole) as loader:
        found = [(views[0], torch.from_numpy(loader.plan.sample_ids(0))) for views in loader.batches(0, 1)]
    changes = {"img_size": size, "resize_size": size, "interpolation": interpolation, "workers": 0}
    with eval_loader(drawn_index, loader_name, **changes) as loader:
        found.append(next((images, sample_ids) for images, _, sample_ids in loader))
    for images, sample_ids in found:
        assert mean_difference(images, by_pil(sample_ids)).max() < LIMITS["cpu"][0][0]
        assert mean_difference(images, by_pil(sample_ids, Image.Resampling.BICUBIC)).min() > 0.3


def test_an_interpolation_that_nobody_has_is_refused(drawn_index, loader_name):
    with pytest.raises(DataError, match="interpolation: got random, want one of bicubic, bilinear"):
        eval_loader(drawn_index, loader_name, interpolation="random")


def test_one_view_is_the_teachers(drawn_index, loader_name):
    with (
        train_loader(drawn_index, loader_name) as two,
        train_loader(drawn_index, loader_name, color_jitter=None) as one,
    ):
        for (teacher_view, _), views in zip(two.batches(0, 2), one.batches(0, 2)):
            assert len(views) == 1 and torch.equal(views[0], teacher_view)


def assert_loaders_agree(index, operations, device="cpu", num_steps=4, **changes):
    differences, counts = [], torch.zeros(2, 256)
    with train_loader(index, "dali", device=device, **changes) as a, train_loader(index, "torchvision", **changes) as b:
        for x, y in zip(copies(a.batches(1, num_steps)), copies(b.batches(1, num_steps))):
            differences.append(mean_difference(x, y))
            counts += torch.stack([counts_by_difference(*views) for views in zip(x, y)])
    differences = torch.cat(differences, dim=1)
    limits = LIMITS[operations]
    for name, found, count, (limit, limit_p99) in zip(("teacher", "student"), differences, counts, limits):
        assert p99(count) <= limit_p99, f"{name} view: 99th percentile {p99(count)} of 255, limit {limit_p99}"
        assert found.mean() < limit, f"{name} view: mean {found.mean():.3f} of 255, limit {limit}"
        assert found.max() < 3 * limit, f"{name} view: largest {found.max():.3f}, image {found.argmax()}"


@pytest.fixture(params=["cpu", "gpu"])
def operations(request, monkeypatch):
    """Both loaders are there; DALI's graph with the operations that it has on a CPU, or with those of a GPU."""
    dali = pytest.importorskip("tinymim_fast.data.dali_loader")
    pytest.importorskip("torchvision")
    if request.param == "gpu":
        for name in ("_resize", "_saturate"):
            original = getattr(dali, name)
            monkeypatch.setattr(dali, name, lambda *arguments, op=original: op(*arguments[:-1], None))
    return request.param


@pytest.mark.parametrize("interpolation", ["bilinear", "lanczos", "nearest"])
def test_dalis_own_interpolations_are_pils(drawn_index, operations, interpolation):
    """Those that a GPU has; the others are refused there, or done by torchvision."""
    changes = {"scale": (0.4, 1.0), "color_jitter": None, "interpolation": interpolation, "num_steps": 1}
    assert_loaders_agree(drawn_index, operations, **changes)


def test_loaders_agree_on_drawn_pictures(drawn_index, operations):
    assert_loaders_agree(drawn_index, operations)


def test_loaders_agree_on_photographs(real_index, operations):
    assert_loaders_agree(real_index, operations, batch_size=32, img_size=224)


@pytest.mark.parametrize(
    "strength", [(0.9, 0, 0), (0, 0.9, 0), (0, 0, 0.9)], ids=["brightness", "contrast", "saturation"]
)
def test_loaders_agree_on_each_jitter(drawn_index, operations, strength):
    assert_loaders_agree(drawn_index, operations, num_steps=2, color_jitter=strength)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_loader_agrees_with_torchvision(drawn_index):
    pytest.importorskip("nvidia.dali")
    pytest.importorskip("torchvision")
    assert_loaders_agree(drawn_index, "gpu", device="cuda:0")


@pytest.mark.parametrize("device", DEVICES)
def test_half_precision(drawn_index, loader_name, device):
    options = {"device": device, "batch_size": 4}
    with (
        train_loader(drawn_index, loader_name, dtype=torch.float16, **options) as half,
        train_loader(drawn_index, loader_name, **options) as full,
    ):
        for views, exact in zip(next(half.batches(0, 1)), next(full.batches(0, 1))):
            assert views.dtype == torch.float16
            torch.testing.assert_close(views.float(), exact, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_dalis_settings_change_no_value(drawn_index, loader_name, device):
    settings = {
        "hw_decoder_load": 0.5,
        "device_memory_padding": 1 << 20,
        "host_memory_padding": 1 << 20,
        "prefetch_queue_depth": 3,
    }
    with (
        train_loader(drawn_index, loader_name, device=device, dali_kwargs=settings) as changed,
        train_loader(drawn_index, loader_name, device=device) as usual,
    ):
        for a, b in zip(copies(changed.batches(0, 3)), copies(usual.batches(0, 3))):
            assert torch.equal(a, b)
    for name, value in (("hw_decoder_load", 2), ("prefetch_queue_depth", 0), ("host_memory_padding", "1 GB")):
        with pytest.raises(DataError, match=f"dali_kwargs: got {name} of {value!r}, want (int|float) from "):
            train_loader(drawn_index, loader_name, dali_kwargs={name: value})
    with pytest.raises(DataError, match="dali_kwargs: got hw_load, want any of hw_decoder_load"):
        train_loader(drawn_index, loader_name, dali_kwargs={"hw_load": 0.5})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_gives_each_image_once(drawn_index, loader_name, world_size, device):
    index = dataclasses.replace(drawn_index, paths=drawn_index.paths[:47])  # divided by neither ranks nor batch
    seen = []
    for rank in range(world_size):
        with eval_loader(index, loader_name, rank=rank, world_size=world_size, device=device) as loader:
            num_batches = 0
            for images, labels, sample_ids in loader:
                num_batches += 1
                assert images.shape == (len(sample_ids), 3, 64, 64) and images.dtype == torch.float32
                assert images.device == labels.device == sample_ids.device == torch.device(device)
                assert labels.dtype == sample_ids.dtype == torch.int64
                assert labels.tolist() == index.labels[sample_ids.cpu()].tolist()
                seen += sample_ids.tolist()
            assert num_batches == len(loader)
    assert seen == list(range(47))


def test_evaluation_is_torchvisions(real_index, loader_name):
    T = pytest.importorskip("torchvision.transforms")
    num_images = len(real_index) if loader_name == "dali" else 40  # the other one is the same code
    limit, limit_p99 = LIMITS["cpu"][0]
    index = dataclasses.replace(real_index, paths=real_index.paths[:num_images])
    counts = torch.zeros(256)
    transform = T.Compose(
        [
            T.Resize(256, T.InterpolationMode.BICUBIC),
            T.CenterCrop(224),
            T.ToTensor(),
            T.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    with eval_loader(index, loader_name, img_size=224, resize_size=256) as loader:
        for images, _, sample_ids in loader:
            theirs = torch.stack([transform(index.read_image(i)) for i in sample_ids])
            assert mean_difference(images, theirs).max() < (limit if loader_name == "dali" else 1e-4)
            counts += counts_by_difference(images, theirs)
    assert counts.sum() == num_images * 3 * 224 * 224 and p99(counts) <= limit_p99


def picture(height=80, width=100):
    ramp = np.linspace(0, 255, height * width * 3).reshape(height, width, 3)
    return Image.fromarray(ramp.astype(np.uint8))


def deep_picture(height=80, width=100):
    return Image.fromarray(np.linspace(0, 65535, height * width).reshape(height, width).astype(np.uint16))


def test_odd_files_decode_to_rgb(tmp_path, loader_name):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown rotated; ImageFolder does not
    picture().convert("L").save(tmp_path / "grey.jpg")
    picture().convert("CMYK").save(tmp_path / "cmyk.jpg")
    picture().convert("RGBA").save(tmp_path / "alpha.png")
    picture().convert("P").save(tmp_path / "palette.png")
    picture().save(tmp_path / "png_called.JPEG", format="PNG")
    picture().save(tmp_path / "progressive.jpg", progressive=True)
    deep_picture().save(tmp_path / "sixteen_bit.png")
    picture().save(tmp_path / "rotated.jpg", exif=exif)
    index = scan_images(tmp_path)
    with eval_loader(index, loader_name, img_size=80, resize_size=80) as loader:
        images, _, sample_ids = next(iter(loader))
    assert sample_ids.tolist() == list(range(8))
    theirs = [index.read_image(i).crop((10, 0, 90, 80)) for i in range(8)]
    theirs = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in theirs])
    theirs = (theirs - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
    assert mean_difference(images, theirs).max() < 1e-3  # not resized, so equal


def num_threads():
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_close_ends_processes_and_threads(drawn_index, loader_name):
    def start_and_close():
        loader = train_loader(drawn_index, loader_name)
        batches = loader.batches(0, 100)
        next(batches)
        loader.close()
        assert next(batches, None) is None

    before, rounds = num_threads(), 6
    for _ in range(rounds):
        start_and_close()
    # Libraries start threads of their own once, at a time of their choice; a leak starts one a round.
    assert num_threads() < before + rounds
    assert multiprocessing.active_children() == []


def test_loader_choice(drawn_index, caplog):
    with caplog.at_level(logging.INFO):
        train_loader(drawn_index, "auto")
    assert "loader: " in caplog.text
    with pytest.raises(DataError, match="loader: got ffcv, want auto or one of dali, torchvision"):
        train_loader(drawn_index, "ffcv")
    with pytest.raises(DataError, match=r"want a CUDA device with its index"):
        train_loader(drawn_index, "auto", device="cuda")


def test_auto_falls_back_to_torchvision(drawn_index, monkeypatch, caplog):
    pytest.importorskip("torchvision")
    monkeypatch.setattr("tinymim_fast.data.loader._is_installed", lambda module: module == "torchvision")
    with caplog.at_level(logging.INFO), train_loader(drawn_index, "auto") as loader:
        next(loader.batches(0, 1))
    assert "loader: torchvision" in caplog.text
    with pytest.raises(DataError, match=r"loader: got dali, which needs nvidia\.dali"):
        train_loader(drawn_index, "dali")
