"""Outputs and classes: by name where there are names, in sorted order where not, or refused."""

import logging

import numpy as np
import pytest

from tinymim_fast.data import ImageIndex
from tinymim_fast.errors import InputError
from tinymim_fast.evaluation.classes import Head, imagenet_synsets, match_folder
from tinymim_fast.evaluation.metrics import read_class_map


def folder(tmp_path, *classes):
    """One image a class; the files are not looked at."""
    labels = np.arange(len(classes), dtype=np.int64)
    sizes = np.full((len(classes), 2), 32, dtype=np.int32)
    return ImageIndex(tmp_path, [f"{c}/x.jpg" for c in classes], labels, tuple(classes), sizes)


def test_names_decide_whatever_the_order(tmp_path):
    head = Head(3, ("dog", "cat", "ant"))
    assert match_folder(folder(tmp_path, "ant", "cat", "dog"), head).labels.tolist() == [2, 1, 0]
    assert match_folder(folder(tmp_path, "cat"), head).labels.tolist() == [1]


def test_without_names_the_sorted_order_is_taken_and_said(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    assert match_folder(folder(tmp_path, "ant", "cat"), Head(2)).labels.tolist() == [0, 1]
    assert "assumed: these, sorted by name" in caplog.text


def test_a_thousand_outputs_are_imagenets(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    synsets = imagenet_synsets()
    found = match_folder(folder(tmp_path, synsets[3], synsets[999]), Head(1000))
    assert found.labels.tolist() == [3, 999] and "no images of 998 of the classifier's 1000 classes" in caplog.text


@pytest.mark.fault("a folder's classes are not the classifier's, or their order can be read in two ways", "an error")
@pytest.mark.parametrize(
    ("classes", "head", "said"),
    [
        (["ant", "cow"], Head(3, ("ant", "bee", "cat")), "1 classes that the classifier does not have, cow; it has"),
        (["ant", "cow"], Head(3), "2 classes, ant, cow, and the classifier 3 outputs, whose names"),
        (["0", "1", "10", *"23456789"], Head(11), "can be read by value or in the order of names"),
        (["n01440764", "pets"], Head(1000), "2 classes, n01440764, pets, and the classifier 1000 outputs"),
    ],
)
def test_what_can_be_wrong_is_refused(classes, head, said, tmp_path):
    with pytest.raises(InputError, match=said) as refusal:
        match_folder(folder(tmp_path, *classes), head)
    assert refusal.value.argument == "data_path"


def test_images_without_classes_are_refused(tmp_path):
    index = ImageIndex(tmp_path, ["x.jpg"], np.zeros(1, np.int64), (tmp_path.name,), np.full((1, 2), 32, np.int32))
    with pytest.raises(InputError, match="has images without classes"):
        match_folder(index, Head(1))


def test_a_class_map_is_a_name_a_line(tmp_path):
    file = tmp_path / "classes.txt"
    file.write_text("fire truck\n\ncat\n")
    assert read_class_map(str(file)) == ("fire truck", "cat")
    for bad in ("cat\ncat\n", ""):
        file.write_text(bad)
        with pytest.raises(InputError, match="none twice") as refusal:
            read_class_map(str(file))
        assert refusal.value.argument == "class_map"
