"""Layouts of data sets: decided from the whole listing, or refused with both readings."""

import re

import pytest
from PIL import Image

from tinymim_fast.data import DataError, find_images, scan_images
from tinymim_fast.data.index import load_index
from tinymim_fast.data.listing import choose, places
from tinymim_fast.data.pack import main as pack
from tinymim_fast.data.scan import main as scan
from tinymim_fast.errors import EXIT_INPUT


def write(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 8), (len(name) * 7 % 255, 30, 60)).save(path)
    return root


@pytest.mark.parametrize(
    ("names", "split", "folder"),
    [
        (["a/1.jpg", "b/2.jpg"], "train", "."),
        (["1.jpg"], "train", "."),
        (["train/a/1.jpg", "val/a/2.jpg"], "val", "val"),
        (["train/a/1.jpg", "validation/a/2.jpg"], "val", "validation"),
        (["training/a/1.jpg", "valid/a/2.jpg"], "train", "training"),
        (["training/a/1.jpg", "valid/a/2.jpg"], "val", "valid"),
        (["train2017/1.jpg", "val2017/2.jpg"], "train", "train2017"),
        (["Train/a/1.jpg"], "train", "Train"),
        (["train/a/1.jpg", "valid/a/2.jpg", "val/a/2.jpg"], "val", "val"),
        (["train/a/1.jpg", "unlabelled/1.jpg"], "unlabelled", "unlabelled"),
    ],
)
def test_what_one_listing_says(tmp_path, names, split, folder):
    write(tmp_path, *names)
    assert choose(tmp_path, split).folder == tmp_path / folder


def test_an_empty_folder_is_no_class_and_no_split(tmp_path):
    write(tmp_path, "a/1.jpg", "train/x/1.jpg")
    for name in ("logs", "val", "@eaDir"):
        (tmp_path / name).mkdir()
    (tmp_path / "train" / "x" / "1.jpg").unlink()
    assert choose(tmp_path, "train").folder == tmp_path


@pytest.mark.fault(
    "a class called train, a stray tar: a folder that can be read in two ways",
    "refused with both readings and --layout",
    tries=3,
)
@pytest.mark.parametrize(
    ("names", "readings", "layouts"),
    [
        (
            ["train/1.jpg", "cat/2.jpg"],
            "as splits (train, leaving out cat) or as 2 classes (of which train)",
            "splits classes",
        ),
        (["cat/1.jpg", "extra.tar"], "as shards (extra.tar) or as images (cat)", "shards classes"),
        (["1.jpg", "extra.tar"], "as shards (extra.tar) or as images (1.jpg)", "shards classes"),
    ],
)
def test_two_readings_are_refused_with_the_way_out(tmp_path, names, readings, layouts, capsys):
    write(tmp_path, *(name for name in names if name.endswith(".jpg")))
    for name in names:
        if name.endswith(".tar"):
            write(tmp_path / "source", "1.jpg")
            assert pack([str(tmp_path / "source"), str(tmp_path / "packed")]) == 0
            (tmp_path / "packed" / "train-000000.tar").rename(tmp_path / name)
            for leftover in ("source/1.jpg", "packed/index.npz", "packed/manifest.json"):
                (tmp_path / leftover).unlink()
    with pytest.raises(DataError, match=rf"^layout: got .*which can be read {re.escape(readings)}; say "):
        find_images(tmp_path, workers=1)
    assert scan([str(tmp_path), "--workers=1"]) == EXIT_INPUT
    assert "scan: --layout: got" in capsys.readouterr().err
    found = {layout: scan_images(tmp_path, layout=layout, workers=1) for layout in layouts.split()}
    assert [bool(index.shards) for index in found.values()] == [layout == "shards" for layout in found]
    assert len({(index.root, len(index.class_names), index.shards) for index in found.values()}) == 2
    assert scan([str(tmp_path), "--workers=1", f"--layout={layouts.split()[1]}"]) == 0
    assert find_images(tmp_path).paths == list(found.values())[1].paths


def test_a_class_called_train_within_a_split_is_a_class(tmp_path):
    write(tmp_path, "train/train/1.jpg", "train/zebra/2.jpg")
    assert scan_images(tmp_path).class_names == ("train", "zebra")


@pytest.mark.parametrize("names", [["a/1.jpg"], ["1.jpg"], ["train/a/1.jpg"], ["train/a/1.jpg", "test/a/1.jpg"]])
def test_a_missing_split_is_an_error(tmp_path, names):
    write(tmp_path, *names)
    with pytest.raises(DataError, match="want val: a folder val/ or shards val-"):
        find_images(tmp_path, split="val", workers=1)
    assert scan([str(tmp_path), "--workers=1"]) == 0
    with pytest.raises(DataError, match=r"index\.npz, which holds (no splits|train); want val"):
        find_images(tmp_path, split="val")


def test_two_folders_of_one_split_are_refused(tmp_path, capsys):
    write(tmp_path, "training/a/1.jpg", "train2017/a/1.jpg")
    with pytest.raises(
        DataError, match=r"split: got .*, where train2017, training may all be train; say which by its name"
    ):
        find_images(tmp_path, workers=1)
    assert find_images(tmp_path, split="training", workers=1).root == tmp_path / "training"
    assert scan([str(tmp_path)]) == EXIT_INPUT and "holds train twice" in capsys.readouterr().err


@pytest.mark.fault("links from a class folder to itself or above", "left out and named", tries=2)
def test_links_are_followed_once_and_loops_named(tmp_path, caplog):
    root = write(tmp_path / "set", "c0/1.jpg", "c0/deep/2.jpg", "c1/3.jpg")
    write(tmp_path / "elsewhere", "4.jpg")
    (root / "c0" / "self").symlink_to(".")
    (root / "c0" / "up").symlink_to("..")
    (root / "c1" / "other").symlink_to(tmp_path / "elsewhere")
    (root / "c1" / "again").symlink_to(tmp_path / "elsewhere")
    (root / "c2").symlink_to(tmp_path / "elsewhere")
    index = scan_images(root, workers=1)
    assert len(index) == 5 and index.labels.tolist() == [0, 0, 1, 1, 2]
    assert "c0/self -> " in caplog.text and "c0/up -> " in caplog.text and "left out folders" in caplog.text


def test_what_was_found_is_said(tmp_path, caplog):
    caplog.set_level("INFO")
    write(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "train/._2.jpg", "train/b/._2.jpg", "val/a/1.jpg", "3.jpg")
    assert len(find_images(tmp_path, workers=1)) == 2
    assert f"{tmp_path / 'train'}: train: 2 images in 2 classes" in caplog.text
    assert "left out 1 images beside its folders" in caplog.text


def test_a_pack_labels_every_split_with_the_classes_of_train(tmp_path):
    write(tmp_path / "src", "train/ant/1.jpg", "train/bee/1.jpg", "train/cat/1.jpg", "val/cat/1.jpg", "val/bee/1.jpg")
    write(tmp_path / "src", "val/dog/2.jpg")
    assert pack([str(tmp_path / "src"), str(tmp_path / "dst"), "--workers=1"]) == 0
    for found in (find_images, scan_images):
        val = found(tmp_path / "dst", split="val", workers=1)
        assert val.labels.tolist() == [1, 2, 3]
    assert load_index(tmp_path / "dst" / "index.npz", "val").class_names == ("ant", "bee", "cat", "dog")


def test_a_flat_split_is_packed_without_labels(tmp_path):
    write(tmp_path / "src", "train/ant/1.jpg", "val/1.jpg", "val/2.jpg")
    assert pack([str(tmp_path / "src"), str(tmp_path / "dst"), "--workers=1"]) == 0
    assert not scan_images(tmp_path / "dst", split="val", workers=1).is_labelled
    assert scan_images(tmp_path / "dst", split="train", workers=1).is_labelled


def test_images_that_share_a_stem_keep_their_own_keys(tmp_path):
    write(tmp_path / "src", "a/x.jpg", "a/x.png", "a/y.jpg")
    assert pack([str(tmp_path / "src"), str(tmp_path / "dst"), "--workers=1"]) == 0
    assert find_images(tmp_path / "dst").paths == ["a/x.jpg", "a/x.png", "a/y.jpg"]
    scanned = scan_images(tmp_path / "dst", workers=1)
    assert scanned.paths == ["a/x%2Ejpg.jpg", "a/x%2Epng.png", "a/y.jpg"] and scanned.labels.tolist() == [0, 0, 0]


def test_places_of_shards(tmp_path):
    for name in ("set-train-0.tar", "set-validation-0.tar", "extra.tar", "tmp_ab_train-1.tar", "._x.tar"):
        (tmp_path / name).touch()
    assert {place.split: [p.name for p in place.shards] for place in places(tmp_path)} == {
        "train": ["set-train-0.tar"],
        "val": ["set-validation-0.tar"],
    }
