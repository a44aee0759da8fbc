"""ImageNet's test sets, as their archives have them but with other images, against plain loops; and refusals."""

import json
import shutil

import pytest
import torch

from support.classifiers import logits_by_loop, save_classifier, write_images
from tinymim_fast.errors import EXIT_INPUT, InputError
from tinymim_fast.evaluate import evaluate, main
from tinymim_fast.evaluation.classes import imagenet_synsets
from tinymim_fast.evaluation.imagenet_sets import read_real_labels


@pytest.fixture(scope="module")
def imagenet_head(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagenet_head")
    return folder, save_classifier(folder, 1000)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A and R, 200 images each, beside each other."""
    root = tmp_path_factory.mktemp("sets")
    write_images(root / "imagenet-a", imagenet_synsets("imagenet_a"))
    write_images(root / "imagenet-r", imagenet_synsets("imagenet_r"))
    (root / "imagenet-a" / "README.txt").write_text("as in the archive")
    return root


def right_by_loop(model, files, outputs):
    """How many of (file, position in outputs) have the best of these outputs there."""
    seen = {}
    right = 0
    for file, label in files:
        content = file.read_bytes()
        if content not in seen:
            seen[content] = logits_by_loop(model, file)
        masked = torch.full_like(seen[content], float("-inf"))
        masked[outputs] = seen[content][outputs]
        right += int(masked.argmax()) == outputs[label]
    return right


def test_the_lists_are_imagenets():
    synsets = imagenet_synsets()
    assert len(synsets) == 1000 and list(synsets) == sorted(synsets) and synsets[0] == "n01440764"  # tench
    for subset in ("imagenet_a", "imagenet_r"):
        assert len(set(imagenet_synsets(subset))) == 200 and set(imagenet_synsets(subset)) < set(synsets)


@pytest.mark.parametrize("metric", ["a", "r"])
def test_two_hundred_classes_compete(metric, imagenet_head, sets):
    folder, model = imagenet_head
    found = evaluate(str(folder), str(sets), metrics=[metric])["results"][metric]
    classes = imagenet_synsets(f"imagenet_{metric}")
    outputs = [imagenet_synsets().index(synset) for synset in classes]
    root = sets / f"imagenet-{metric}"
    files = [(next((root / synset).iterdir()), label) for label, synset in enumerate(classes)]
    assert found["num_images"] == 200 and found["top1_correct"] == right_by_loop(model, files, outputs)
    assert found["top5_correct"] >= found["top1_correct"] > 0, "a count that tells nothing"
    itself = evaluate(str(folder), str(root), metrics=[metric])["results"][metric]
    assert itself == found, "the set's own folder is the same"


def test_v2s_folders_are_numbers_not_their_sorted_order(imagenet_head, tmp_path):
    folder, model = imagenet_head
    root = write_images(tmp_path / "imagenetv2-matched-frequency-format-val", map(str, range(1000)))
    for k in range(32):  # each picture once where the model puts it, so that some are right
        picture = root / str(k) / f"{k}.JPEG"
        best = int(logits_by_loop(model, picture).argmax())
        shutil.copy(picture, root / str(best) / "best.JPEG")
    found = evaluate(str(folder), str(tmp_path), metrics=["v2"])["results"]["v2"]
    files = [(file, int(file.parent.name)) for file in root.rglob("*.JPEG")]
    want = right_by_loop(model, files, list(range(1000)))
    assert (found["num_images"], found["top1_correct"]) == (len(files), want) and want >= 5
    by_name = sorted(map(str, range(1000)))
    assert right_by_loop(model, [(f, by_name.index(str(i))) for f, i in files], list(range(1000))) < want


@pytest.fixture(scope="module")
def validation(tmp_path_factory):
    """Twelve images of six classes in ImageNet's names."""
    root = tmp_path_factory.mktemp("validation")
    classes = imagenet_synsets()[10:22]
    numbers = {synset: f"ILSVRC2012_val_{100 + i:08d}.JPEG" for i, synset in enumerate(classes)}
    write_images(root / "val", classes, names=numbers)
    return root


def test_reals_labels_are_of_the_file_several_or_none(imagenet_head, validation, tmp_path):
    folder, model = imagenet_head
    files = sorted((validation / "val").rglob("*.JPEG"), key=lambda file: file.name)
    best = [int(logits_by_loop(model, file).argmax()) for file in files]
    labels = [[7]] * 50_000
    labels[99:111] = [[best[0]], [3, best[1]], [], [best[3] ^ 1], *([[]] * 7), [best[11], 5, 6]]
    (tmp_path / "real.json").write_text(json.dumps(labels))
    options = {"real_labels": str(tmp_path / "real.json")}
    found = evaluate(str(folder), str(validation), metrics=["real"], **options)["results"]["real"]
    assert (found["num_images"], found["top1_correct"], found["top1"]) == (4, 3, 75.0)


def test_timm_has_reals_labels():
    labels = read_real_labels()
    assert len(labels) == 50_000 and labels[0] == [] and all(0 <= x < 1000 for of_image in labels for x in of_image)


def test_sketch_wants_all_thousand(imagenet_head, sets):
    with pytest.raises(InputError, match="not sketch: 200 classes, want 1000") as refusal:
        evaluate(str(imagenet_head[0]), str(sets / "imagenet-r"), metrics=["sketch"])
    assert refusal.value.argument == "data_path"


def as_validation(sets, tmp_path):
    (tmp_path / "val").symlink_to(sets / "imagenet-a")
    return tmp_path


def lacking_one(sets, tmp_path):
    shutil.copytree(sets / "imagenet-a", tmp_path / "imagenet-a")
    shutil.rmtree(tmp_path / "imagenet-a" / imagenet_synsets("imagenet_a")[0])
    return tmp_path


REFUSED = {
    "a folder of A among all 1000": (as_validation, "top1", "--metric", "take the metric a"),
    "R's folder as A": (lambda sets, tmp: sets / "imagenet-r", "a", "--data-path", "not imagenet-a"),
    "a class is lacking": (lacking_one, "a", "--data-path", "199 classes, want 200"),
    "no such folder": (lambda sets, tmp: tmp / "none", "a", "--data-path", "is no folder"),
    "names that ReaL doesn't know": (as_validation, "real", "--data-path", "ILSVRC2012_val_00000001.JPEG and so on"),
}


@pytest.mark.fault("a test set is given to a head or metric it is not for, or lacks classes", "an error, no number")
@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_another_number_is_refused(case, imagenet_head, sets, tmp_path, capsys):
    make, metric, flag, said = REFUSED[case]
    code = main([str(imagenet_head[0]), f"--data-path={make(sets, tmp_path)}", "--metric", metric])
    error = capsys.readouterr().err
    assert code == EXIT_INPUT and error.startswith(f"evaluate: {flag}: ") and said in error
    assert error.count("\n") == 1, "found before anything else is said"


def test_other_heads_are_refused(sets, tmp_path):
    save_classifier(tmp_path, 200)
    with pytest.raises(InputError, match="this one has 200 outputs for other ones") as refusal:
        evaluate(str(tmp_path), str(sets), metrics=["a"])
    assert refusal.value.argument == "metric"
