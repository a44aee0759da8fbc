import logging
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tinymim_fast.data import DataError, ImageIndex, find_images, scan_images


def write_image(path, height=8, width=12, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (200, 30, 60)).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    write_image(tmp_path / "b" / "2.png", 9, 7)
    write_image(tmp_path / "b" / "deep" / "1.JPG", 5, 6)
    write_image(tmp_path / "a" / "3.jpeg", 10, 20)
    write_image(tmp_path / ".cache" / "4.jpg")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "c").mkdir()
    return tmp_path


def test_scan_gives_torchvisions_classes_and_stored_sizes(folder, caplog):
    index = scan_images(folder)
    assert index.paths == ["a/3.jpeg", "b/2.png", "b/deep/1.JPG"]
    assert index.class_names == ("a", "b", "c")
    assert "classes without images: c" in caplog.text
    assert index.labels.tolist() == [0, 1, 1] and index.labels.dtype == np.int64
    assert index.sizes.tolist() == [[10, 20], [9, 7], [5, 6]] and index.sizes.dtype == np.int32
    assert len(index) == 3 and index.damaged == {}


def test_scan_agrees_with_torchvision_on_the_drawn_folder(drawn_root, drawn_index):
    datasets = pytest.importorskip("torchvision.datasets")
    theirs = datasets.ImageFolder(drawn_root / "train")
    assert [drawn_index.file(i) for i in range(len(drawn_index))] == [path for path, _ in theirs.samples]
    assert drawn_index.labels.tolist() == theirs.targets and list(drawn_index.class_names) == theirs.classes


def test_orientation_in_exif_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, meant to be shown standing
    write_image(tmp_path / "a" / "1.jpg", 8, 12, exif=exif)
    assert scan_images(tmp_path).sizes.tolist() == [[8, 12]]


def test_split_is_the_folder_or_inside_it(tmp_path):
    write_image(tmp_path / "train" / "a" / "1.jpg")
    write_image(tmp_path / "val" / "a" / "2.jpg")
    from_parent = scan_images(tmp_path, split="train")
    assert from_parent.root == tmp_path / "train" and from_parent.paths == ["a/1.jpg"]
    assert scan_images(tmp_path / "train", split="train").paths == ["a/1.jpg"]


def test_images_without_class_folders_share_one_label(tmp_path):
    write_image(tmp_path / "flat" / "2.jpg")
    write_image(tmp_path / "flat" / "1.jpg")
    index = scan_images(tmp_path / "flat")
    assert index.paths == ["1.jpg", "2.jpg"] and index.labels.tolist() == [0, 0] and index.class_names == ("flat",)


def test_save_and_load(folder, tmp_path):
    index = scan_images(folder)
    index.save(tmp_path / "index.npz")
    loaded = ImageIndex.load(tmp_path / "index.npz")
    for name in ("root", "paths", "class_names", "damaged", "stamps", "shards"):
        assert getattr(loaded, name) == getattr(index, name)
    np.testing.assert_array_equal(loaded.labels, index.labels)
    for name in ("sizes", "num_bytes", "verdicts"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(index, name))
    assert not list(tmp_path.glob("tmp_*"))


@pytest.mark.parametrize("content", [None, b"", b"no archive"])
def test_load_refuses_other_files(tmp_path, content):
    path = tmp_path / "index.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"index\.npz, want an image index"):
        ImageIndex.load(path)


def test_missing_empty_and_imageless_folders(tmp_path):
    with pytest.raises(DataError, match=r"nowhere, which is no folder; want DIR/<class>"):
        scan_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty, which is empty; want DIR/<class>"):
        scan_images(tmp_path / "empty")
    (tmp_path / "texts" / "a").mkdir(parents=True)
    (tmp_path / "texts" / "a" / "1.txt").write_text("no image")
    with pytest.raises(DataError, match="texts, which has no images; want DIR/<class>"):
        scan_images(tmp_path / "texts")


def test_broken_headers_are_left_out_and_named(folder, caplog):
    (folder / "a" / "broken.jpg").write_bytes(b"no picture")
    (folder / "b" / "hollow.jpg").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        index = find_images(folder)
    assert index.damaged == {"a/broken.jpg": "non-image", "b/hollow.jpg": "empty"} and len(index) == 3
    assert "left out 2 of 5 images: a/broken.jpg (non-image), b/hollow.jpg (empty)" in caplog.text


def test_only_broken_headers(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(12):
        (tmp_path / "a" / f"{i:02}.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"no image is readable: a/00\.jpg .*a/09\.jpg \(non-image\) and 2 more"):
        scan_images(tmp_path)


def test_import_loads_neither_dali_nor_torchvision():
    code = "import sys, tinymim_fast.data; print([m for m in ('nvidia.dali', 'torchvision') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
