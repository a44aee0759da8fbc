"""Top-1 and top-5 of classifiers: against a plain loop, on several ranks, from every format that has a head."""

import argparse
import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from support.classifiers import logits_by_loop, save_classifier
from support.programs import TINY, run_forked, start_ranks
from tinymim_fast.errors import EXIT_INPUT, InputError
from tinymim_fast.evaluate import evaluate, main
from tinymim_fast.evaluation.classes import load_with_head
from tinymim_fast.models.checkpoints import METADATA_KEY, read_weights


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    return folder, save_classifier(folder, 16)


def by_loop(model, root, **view):
    """Top-1 and top-5 by image, of class folders whose sorted order is the head's."""
    ranks = []
    for label, folder in enumerate(sorted(p for p in root.iterdir() if p.is_dir())):
        for file in sorted(folder.iterdir()):
            order = logits_by_loop(model, file, **view).argsort(descending=True).tolist()
            ranks.append(order.index(label))
    return {"num_images": len(ranks), "top1_correct": ranks.count(0), "top5_correct": sum(r < 5 for r in ranks)}


def test_counts_are_a_plain_loops(classifier, image_folder):
    folder, model = classifier
    found = evaluate(str(folder), str(image_folder), metrics=["top1"], batch_size=7)["results"]["top1"]
    want = by_loop(model, image_folder / "val")
    assert {name: found[name] for name in want} == want
    assert 0 < want["top1_correct"] < want["top5_correct"] < want["num_images"] == 32, "counts that tell nothing"
    assert found["top1"] == 100 * want["top1_correct"] / 32 and found["top5"] == 100 * want["top5_correct"] / 32


def test_the_crop_can_be_chosen(classifier, image_folder):
    folder, model = classifier
    found = evaluate(str(folder), str(image_folder), metrics=["top1"], crop_pct=1.0)
    want = by_loop(model, image_folder / "val", resize_size=32)
    assert found["images"]["resize_size"] == 32
    assert found["results"]["top1"]["top1_correct"] == want["top1_correct"]
    with pytest.raises(InputError, match="want a share of the resized image"):
        evaluate(str(folder), str(image_folder), metrics=["top1"], crop_pct=1.5)


def test_one_two_and_three_ranks_count_the_same(classifier, image_folder, tmp_path):
    """32 images in batches of 7: 3 ranks have 10, 11 and 11."""
    flags = [classifier[0], f"--data-path={image_folder}", "--metric", "top1", "knn", "linear", "--batch-size=7"]
    flags += ["--workers=1", "--nb-knn", "1", "20"]
    results = []
    for ranks in (1, 2, 3):
        out = tmp_path / str(ranks)
        if ranks == 1:
            code, output = run_forked("evaluate", *flags, f"--output-dir={out}")
            assert code == 0, output
        else:
            runs = start_ranks("evaluate", *flags, f"--output-dir={out}", ranks=ranks)
            try:
                outputs = [run.communicate()[0] for run in runs]
            finally:
                for run in runs:
                    run.kill()
            assert [run.returncode for run in runs] == [0] * ranks, outputs
        assert {p.name for p in out.iterdir()} == {"results.json", "results.md", "results.png"}
        found = json.loads((out / "results.json").read_text())
        assert found["ranks"] == ranks
        of_top1 = {name: found["results"]["top1"][name] for name in ("num_images", "top1_correct", "top5_correct")}
        results.append((of_top1, found["results"]["knn"], found["results"]["linear"]["top1_correct"]))
    assert results[0] == results[1] == results[2]
    assert results[0][0] == by_loop(classifier[1], image_folder / "val")


def as_timm_folder(model, folder, tmp_path):
    args = {**TINY, "img_size": 32}
    save_for_hf(model, str(tmp_path), model_args=args, safe_serialization=True)
    return str(tmp_path)


def as_official_file(model, folder, tmp_path):
    """TinyMIM's fine-tuned files: `fc_norm` behind the mean over patches, and a head."""
    told = argparse.Namespace(model="vit_tiny_patch16")
    torch.save({"model": model.state_dict(), "args": told}, tmp_path / "finetuned.pth")
    return str(tmp_path / "finetuned.pth")


@pytest.mark.parametrize("save", [as_timm_folder, as_official_file], ids=lambda save: save.__name__)
def test_heads_come_from_other_formats_too(save, image_folder, tmp_path):
    torch.manual_seed(3)
    official = save is as_official_file
    kwargs = {"global_pool": "avg", "img_size": 224, "depth": 12} if official else {**TINY, "img_size": 32}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=16, **kwargs).eval()
    torch.nn.init.normal_(model.head.weight, std=1.0)
    vit, info, head = load_with_head(save(model, None, tmp_path))
    images = torch.randn(2, 3, *model.patch_embed.img_size)
    assert torch.equal(vit.eval()(images), model(images)) and vit.num_classes == 16
    assert info.kind == ("fine-tuned" if official else "timm")
    assert head.num_classes == 16


def test_no_classifier_is_an_error_before_any_work(classifier, image_folder, tmp_path, capsys):
    bare = tmp_path / "bare"
    save_classifier(bare, 0)
    assert main([str(bare), f"--data-path={image_folder}", "--metric", "top1"]) == EXIT_INPUT
    assert "--metric:" in (said := capsys.readouterr().err) and "has no classifier" in said
    headless = tmp_path / "headless"
    model = save_classifier(headless, 16)
    state, info = load_file(headless / "model.safetensors"), read_weights(headless)[1]
    described = {METADATA_KEY: json.dumps({**vars(info)})}
    save_file({k: v for k, v in state.items() if not k.startswith("head.")}, headless / "model.safetensors", described)
    assert main([str(headless), f"--data-path={image_folder}", "--metric", "top1"]) == EXIT_INPUT
    assert "it lacks head.weight" in capsys.readouterr().err and model.num_classes == 16


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--nb-knn", "0"], "--nb-knn: got 0"),
        (["--batch-size=0"], "--batch-size: got 0"),
        (["--metric", "top1", "--class-map=/nowhere"], "--class-map: /nowhere: can't be read"),
        (["--metric", "top1", "--make-corruptions=x"], "--make-corruptions: makes images for the metric c"),
        (["--metric", "real", "--real-labels=/nowhere"], "--metric: got real, which wants"),
        (["--metric", "a"], "--metric: got a, which wants a classifier of ImageNet's 1000 classes"),
        (["--metric", "c"], "--data-path: "),
        (["--metric", "top1", "--class-map={map}"], "--class-map: got 2 names for 16 outputs, want one for each"),
    ],
)
def test_bad_flags(flags, said, classifier, image_folder, tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / "map.txt").write_text("ant\nbee\n")
    flags = [flag.format(map=tmp_path / "map.txt") for flag in flags]
    assert main([str(classifier[0]), f"--data-path={image_folder}", f"--output-dir={out}", *flags]) == EXIT_INPUT
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not out.exists()


def test_an_output_folder_with_something_is_refused(classifier, image_folder, tmp_path, capsys):
    (tmp_path / "precious").write_text("x")
    assert main([str(classifier[0]), f"--data-path={image_folder}", f"--output-dir={tmp_path}"]) == EXIT_INPUT
    assert "--output-dir: " in capsys.readouterr().err and len(list(tmp_path.iterdir())) == 1
