"""Labels that mean the same in both splits, and what tells nothing."""

import logging
import shutil
import tarfile

import pytest

from tinymim_fast.errors import InputError
from tinymim_fast.evaluation.splits import find_splits

CLASSES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def classes(image_folder, tmp_path_factory):
    """Class folders with three images each."""
    folder = tmp_path_factory.mktemp("classes") / "all"
    drawn = sorted((image_folder / "train").iterdir())
    for name, source in zip(CLASSES, drawn):
        (folder / name).mkdir(parents=True)
        for file in sorted(source.iterdir())[:3]:
            shutil.copy(file, folder / name / f"{source.name}_{file.name}")
    return folder


def both(root, classes):
    for split in ("train", "val"):
        shutil.copytree(classes, root / split)
    return root


def names(index):
    """Class name by image, as the labels say it."""
    return {path.split("/")[-1]: index.class_names[label] for path, label in zip(index.paths, index.labels)}


def truth(classes):
    return {file.name: folder.name for folder in classes.iterdir() for file in folder.iterdir()}


def test_the_same_classes(classes, tmp_path):
    train, val = find_splits(str(both(tmp_path, classes)), workers=1)
    assert names(train) == names(val) == truth(classes)
    assert val.labels.tolist() == train.labels.tolist()


@pytest.mark.fault("validation classes are missing or empty", "labels match by name; said")
@pytest.mark.parametrize("missing", CLASSES)
def test_a_class_without_validation_images_is_said_and_shifts_no_label(missing, classes, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    shutil.rmtree(both(tmp_path, classes) / "val" / missing)
    train, val = find_splits(str(tmp_path), workers=1)
    kept = {name: label for name, label in truth(classes).items() if label != missing}
    assert names(val) == kept and val.class_names == train.class_names
    assert f"no validation images of 1 classes: {missing}" in caplog.text


@pytest.mark.fault("validation classes are missing or empty", "labels match by name; said")
@pytest.mark.parametrize("split", ["train", "val"])
def test_an_empty_folder_shifts_no_label(split, classes, tmp_path):
    (both(tmp_path, classes) / split / "@eaDir").mkdir()
    train, val = find_splits(str(tmp_path), workers=1)
    assert names(train) == names(val) == truth(classes)
    number = {name: label for label, name in enumerate(train.class_names)}
    assert val.labels.tolist() == [number[names(val)[path.split("/")[-1]]] for path in val.paths]


def flat(root, classes):
    shutil.copytree(classes, root / "train")
    (root / "val").mkdir()
    for file in classes.rglob("*.jpg"):
        shutil.copy(file, root / "val" / file.name)


def no_val(root, classes):
    shutil.copytree(classes, root / "train")


def alone(root, classes):
    for folder in classes.iterdir():
        shutil.copytree(folder, root / folder.name)


def unlabelled_shards(root, classes):
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}-000.tar", "w") as file:
            for image in classes.rglob("*.jpg"):
                file.add(image, arcname=image.name)


def linked(root, classes):
    shutil.copytree(classes, root / "train")
    (root / "val").symlink_to(root / "train")


def strangers(root, classes):
    both(root, classes)
    (root / "val" / "ant").rename(root / "val" / "dog")


def one_class(root, classes):
    both(root, classes)
    for split in ("train", "val"):
        shutil.rmtree(root / split / "ant"), shutil.rmtree(root / split / "bee")


ERRORS = {
    flat: "classes without training images",
    no_val: "want val",
    alone: "no splits; want val",
    unlabelled_shards: "one class",
    linked: "9 of 9 validation images are training images",
    strangers: "1 classes without training images, dog; the training images have ant, bee, cat",
    one_class: "the training images have one class, cat",
}


@pytest.mark.fault("an evaluation without val/, labels or shared classes", "an error, no number", tries=7)
@pytest.mark.parametrize("make", ERRORS, ids=lambda make: make.__name__)
def test_what_tells_nothing_is_an_error(make, classes, tmp_path):
    make(tmp_path, classes)
    with pytest.raises(InputError, match=ERRORS[make]) as refusal:
        find_splits(str(tmp_path), workers=1)
    assert refusal.value.argument == "data_path"
