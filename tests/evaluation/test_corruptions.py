"""ImageNet-C: errors against a plain loop, the formula of their mean, the archives' folders, and images of our own."""

import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from support.classifiers import logits_by_loop, save_classifier, write_images
from tinymim_fast.data import find_images
from tinymim_fast.data.views import EvalView
from tinymim_fast.errors import InputError
from tinymim_fast.evaluate import evaluate
from tinymim_fast.evaluation import make_corruptions as maker
from tinymim_fast.evaluation.corruptions import ALEXNET_ERRORS, GROUPS, SEVERITIES, find_corrupted, summarise
from tinymim_fast.evaluation.report import lines, markdown

CLASSES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    return folder, save_classifier(folder, 3)


@pytest.fixture(scope="module")
def corrupted(tmp_path_factory):
    """15 x 5 folders of three images as the archives of four groups unpack, each brighter than the one before."""
    root = tmp_path_factory.mktemp("corrupted") / "imagenet-c"
    clean = write_images(tmp_path_factory.mktemp("clean"), CLASSES)
    for number, corruption in enumerate(ALEXNET_ERRORS):
        group = GROUPS[min(number // 4, 3)]
        for severity in SEVERITIES:
            for file in clean.rglob("*.JPEG"):
                target = root / group / corruption / str(severity) / file.parent.name / file.name
                target.parent.mkdir(parents=True)
                with Image.open(file) as image:
                    brighter = np.minimum(np.asarray(image).astype(int) + 9 * severity + 6 * number, 255)
                Image.fromarray(np.uint8(brighter[:32, :32])).save(target, quality=95)
    return root


def test_errors_are_a_plain_loops(classifier, corrupted):
    folder, model = classifier
    found = evaluate(str(folder), str(corrupted.parent), metrics=["c"])
    result = found["results"]["c"]
    for corruption in ("gaussian_noise", "snow", "jpeg_compression"):
        of_severities = find_corrupted(str(corrupted))[corruption]
        for severity, place in of_severities.items():
            best = [int(logits_by_loop(model, next((place / c).iterdir()), resize_size=32).argmax()) for c in CLASSES]
            right = sum(output == label for label, output in enumerate(best))
            assert result["counts"][corruption][severity - 1] == [3, right]
    rights = [right for of_corruption in result["counts"].values() for _, right in of_corruption]
    assert len(rights) == 75 and len(set(rights)) > 1, "counts that tell nothing"
    assert result["mean_error"] == pytest.approx(100 - 100 * sum(rights) / (75 * 3))
    assert "mce" not in result, "AlexNet's errors are of ImageNet's classes"
    assert any("ImageNet-C" in line and "error" in line for line in lines(found))
    assert f"| {'snow'} | " in markdown(found)


def test_the_mean_corruption_error_is_the_papers_formula():
    rng = np.random.default_rng(0)
    right = rng.integers(0, 50_000, (15, 5))
    counts = {c: [[50_000, int(n)] for n in of_c] for c, of_c in zip(ALEXNET_ERRORS, right)}
    found = summarise(counts, of_imagenet=True)
    errors = 1 - right / 50_000
    want = [sum(errors[i]) / (5 * alexnet) for i, alexnet in enumerate(ALEXNET_ERRORS.values())]
    assert found["mce"] == pytest.approx(100 * np.mean(want))
    assert list(found["corruption_errors"].values()) == pytest.approx(list(100 * np.array(want)))


def test_alexnet_is_at_one_hundred():
    counts = {c: [[10**6, 10**6 - round(10**6 * error)]] * 5 for c, error in ALEXNET_ERRORS.items()}
    assert summarise(counts, of_imagenet=True)["mce"] == pytest.approx(100)


def test_a_missing_severity_is_named(corrupted, tmp_path):
    copy = shutil.copytree(corrupted, tmp_path / "c")
    shutil.rmtree(copy / "noise" / "shot_noise" / "3")
    with pytest.raises(InputError, match="these are missing: shot_noise/3") as refusal:
        find_corrupted(str(copy))
    assert refusal.value.argument == "data_path"


def test_another_class_in_one_folder_is_named(classifier, corrupted, tmp_path):
    copy = shutil.copytree(corrupted, tmp_path / "c")
    (copy / "noise" / "shot_noise" / "3" / "bee").rename(copy / "noise" / "shot_noise" / "3" / "dog")
    with pytest.raises(InputError, match=r"shot_noise/3: has other classes than .*: bee, dog"):
        evaluate(str(classifier[0]), str(copy), metrics=["c"])


VIEW = EvalView(img_size=32, resize_size=37)


@pytest.fixture
def stand_in(monkeypatch):
    """A package that darkens, so that layout, order and going on can be seen without the real one."""

    def corrupt(pixels, corruption_name, severity):
        assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
        calls.append((corruption_name, severity, np.random.random()))
        return pixels // (1 + severity)

    calls = []
    monkeypatch.setitem(sys.modules, "imagecorruptions", SimpleNamespace(corrupt=corrupt, __spec__="is there"))
    return calls


def test_images_are_made_once_and_evaluated(classifier, stand_in, tmp_path):
    write_images(tmp_path / "data" / "val", CLASSES)
    out = tmp_path / "out"
    options = {"metrics": ["c"], "make_corruptions": str(out), "workers": 1}
    found = evaluate(str(classifier[0]), str(tmp_path / "data"), **options)["results"]["c"]
    assert all(of_severity[0] == 3 for of_c in found["counts"].values() for of_severity in of_c)
    assert len(stand_in) == 75 * 3 and len({draw for *_, draw in stand_in}) == 75 * 3
    assert sorted(p.name for p in (out / "fog" / "2" / "ant").iterdir()) == ["0.JPEG"]
    with Image.open(out / "fog" / "2" / "ant" / "0.JPEG") as made:
        assert made.size == (32, 32) and np.asarray(made).max() < 100
    draws = list(stand_in)
    shutil.rmtree(out / "fog" / "2")
    index = find_images(tmp_path / "data", split="val", workers=1)
    maker.make_corruptions(index, out, VIEW, workers=1)
    assert stand_in[75 * 3 :] == [draw for draw in draws if draw[:2] == ("fog", 2)], "the same noise, nothing else"


def test_a_folder_of_other_images_is_refused(stand_in, tmp_path):
    index = find_images(write_images(tmp_path / "images", CLASSES), layout="classes", workers=1)
    maker.make_corruptions(index, tmp_path / "out", VIEW, workers=1)
    with pytest.raises(InputError, match="holds other images' corruptions"):
        maker.make_corruptions(index, tmp_path / "out", VIEW, seed=1, workers=1)
    with pytest.raises(InputError, match="exists already"):
        maker.make_corruptions(index, tmp_path / "images", VIEW, workers=1)
    with pytest.raises(InputError, match="got 16 pixels a side, want 32 or more"):
        maker.make_corruptions(index, tmp_path / "new", EvalView(img_size=16, resize_size=18))


def test_the_package_is_asked_for_before_any_work(monkeypatch):
    monkeypatch.setattr(maker.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs the package imagecorruptions-imaug") as refusal:
        maker.check_maker()
    assert refusal.value.argument == "make_corruptions"


def test_the_real_package_changes_images_more_with_severity(tmp_path):
    pytest.importorskip("imagecorruptions", reason="pip install 'tinymim_fast[corruptions]'")
    index = find_images(write_images(tmp_path / "images", CLASSES), layout="classes", workers=1)
    maker.make_corruptions(index, tmp_path / "out", VIEW, workers=1)
    clean = np.asarray(maker._cropped(index.read_image(0), VIEW)).astype(float)
    change = {}
    for corruption, of_severities in find_corrupted(str(tmp_path / "out")).items():
        for severity, folder in of_severities.items():
            with Image.open(next((folder / "ant").iterdir())) as made:
                change[corruption, severity] = np.abs(np.asarray(made) - clean).mean()
    assert min(change.values()) > 0.5 and all(change[c, 5] > change[c, 1] for c in ALEXNET_ERRORS)
