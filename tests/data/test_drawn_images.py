import numpy as np
import pytest
from PIL import Image

from tinymim_fast.data import DataError, draw_image_folder
from tinymim_fast.data.drawn_images import DRAWN_CLASSES, draw_picture

SMALL = {"num_train_per_class": 2, "num_val_per_class": 1, "size": 32, "seed": 3}


def contents(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_layout(drawn_root):
    for split, count in (("train", 3), ("val", 2)):
        folders = sorted(path.name for path in (drawn_root / split).iterdir())
        assert tuple(folders) == DRAWN_CLASSES and len(folders) >= 12
        for folder in folders:
            files = list((drawn_root / split / folder).iterdir())
            assert len(files) == count
            assert all(Image.open(file).size == (96, 96) and Image.open(file).mode == "RGB" for file in files)


def test_same_arguments_same_pictures(tmp_path):
    a = contents(draw_image_folder(tmp_path / "a", **SMALL))
    assert a == contents(draw_image_folder(tmp_path / "deep" / "b", **SMALL))
    c = contents(draw_image_folder(tmp_path / "c", **{**SMALL, "seed": 4}))
    assert a.keys() == c.keys() and not set(a.values()) & set(c.values())
    assert len(set(a.values())) == len(a)  # no picture twice
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c", "deep"]  # nothing temporary left


def test_own_folder_is_kept_or_replaced(tmp_path):
    root = draw_image_folder(tmp_path / "sample", **SMALL)
    some_file = root / "train" / "disc" / "00000.jpg"
    written = some_file.stat().st_mtime_ns
    draw_image_folder(root, **SMALL)
    assert some_file.stat().st_mtime_ns == written
    draw_image_folder(root, **{**SMALL, "num_train_per_class": 1})
    assert len(list((root / "train" / "disc").iterdir())) == 1


def test_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(DataError, match="holds something else; want a new or empty folder"):
        draw_image_folder(tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tinymim_fast.data.drawn_images.draw_picture", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        draw_image_folder(tmp_path / "sample", **SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def pictures():
    """(classes, 60, 48, 48, 3)"""
    return np.array(
        [
            [draw_picture(name, 48, np.random.default_rng([0, label, i])) for i in range(60)]
            for label, name in enumerate(DRAWN_CLASSES)
        ]
    )


def nearest_neighbour_accuracy(features):
    """Leave the second half out: (classes, n, d) -> accuracy of the 9 nearest of the first half, by majority."""
    half = features.shape[1] // 2
    known, asked = features[:, :half], features[:, half:]
    labels = np.repeat(np.arange(len(features)), half)
    distance = np.linalg.norm(asked.reshape(-1, 1, known.shape[-1]) - known.reshape(1, -1, known.shape[-1]), axis=-1)
    votes = labels[np.argsort(distance, axis=1)[:, :9]]
    predicted = np.array([np.bincount(vote, minlength=len(features)).argmax() for vote in votes])
    return np.mean(predicted == np.repeat(np.arange(len(features)), asked.shape[1]))


def test_mean_color_does_not_give_the_class_away(pictures):
    means = pictures.mean(axis=(2, 3))  # (classes, n, 3)
    chance = 1 / len(DRAWN_CLASSES)
    assert nearest_neighbour_accuracy(means) < 2.5 * chance
    half = means.shape[1] // 2
    centers = means[:, :half].mean(axis=1)
    nearest = np.linalg.norm(means[:, half:, None] - centers, axis=-1).argmin(axis=-1)
    assert np.mean(nearest == np.arange(len(centers))[:, None]) < 2.5 * chance


def test_form_does(pictures):
    # spectra see stripes and grids whatever their colours; shapes need a better learner
    grey = pictures.astype(np.float64).mean(axis=-1)
    grey -= grey.mean(axis=(2, 3), keepdims=True)
    spectrum = np.abs(np.fft.fft2(grey))[:, :, :12, :]
    spectrum = np.log(spectrum.reshape(*spectrum.shape[:2], 12, 24, 2).mean(axis=-1) + 1).reshape(
        *spectrum.shape[:2], -1
    )
    spectrum -= spectrum.mean(axis=-1, keepdims=True)
    assert nearest_neighbour_accuracy(spectrum) > 4 / len(DRAWN_CLASSES)
