"""Evaluation on several ranks."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from support.programs import ROOT, TINY, run_training
from tinymim_fast.data.views import EvalView
from tinymim_fast.errors import EXIT_INPUT
from tinymim_fast.evaluation.features import extract_features
from tinymim_fast.evaluation.knn import knn_accuracy
from tinymim_fast.evaluation.splits import find_splits
from tinymim_fast.models.checkpoints import save_weights
from tinymim_fast.models.model_info import ModelInfo
from tinymim_fast.models.taps import Place, Taps
from tinymim_fast.models.vit import create_vit, head_layout

TORCHRUN = Path(sys.executable).parent / "torchrun"
WORKER = Path(__file__).parent / "support" / "rank_worker.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    vit = create_vit("vit_tiny_patch16_224", img_size=32, **TINY)
    folder = tmp_path_factory.mktemp("checkpoint")
    info = ModelInfo("vit_tiny_patch16_224", {**TINY, "img_size": 32}, "tinymim", head_layout(vit))
    save_weights(folder, vit.state_dict(), info)
    return folder, vit


def test_three_ranks_count_each_image_once(image_folder, checkpoint, tmp_path):
    """96 and 32 images in batches of 7: neither ranks nor batches divide them."""
    folder, vit = checkpoint
    code, output = run_training(
        *[TORCHRUN, "--standalone", "--nproc-per-node=3", WORKER, "evaluate", tmp_path / "features.npz"],
        *[folder, f"--data-path={image_folder}", "--batch-size=7", "--workers=1"],
    )
    assert code == 0, output
    theirs = np.load(tmp_path / "features.npz")
    taps = Taps(vit.eval(), [Place("norm1", len(vit.blocks))])
    view = EvalView(img_size=32, resize_size=37)
    options = {"batch_size": 32, "workers": 1, "device": torch.device("cpu")}
    splits = dict(zip(("train", "val"), find_splits(str(image_folder), workers=1)))
    ours = {split: extract_features(taps, index, view, **options) for split, index in splits.items()}
    for split, count in (("train", 96), ("val", 32)):
        features, labels = ours[split]
        assert len(labels) == count and theirs[f"{split}_y"].tolist() == labels.tolist()
        np.testing.assert_allclose(theirs[f"{split}_x"], features, atol=1e-5)
        assert features.std(0).min() > 1e-3, "images whose features don't differ would not tell which is which"
    accuracy = [line for line in output.splitlines() if line.startswith("k-NN accuracy: ")]
    assert accuracy == [f"k-NN accuracy: {100 * knn_accuracy(ours['train'], ours['val']):.2f} %"]


def test_bad_input_on_several_ranks_is_one_line(checkpoint, tmp_path):
    code, output = run_training(
        *[TORCHRUN, "--standalone", "--nproc-per-node=2", "-m", "tinymim_fast.evaluate"],
        *[checkpoint[0], f"--data-path={tmp_path / 'none'}"],
    )
    assert code != 0 and f"exitcode  : {EXIT_INPUT}" in output
    assert len([line for line in output.splitlines() if line.startswith("evaluate: ")]) == 1, output


@pytest.mark.parametrize("program", ["evaluate", "export"])
def test_help_does_not_wait_for_torch(program):
    code = f"import sys; sys.modules['torch'] = None; from tinymim_fast.{program} import main; main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "--model-kwargs" in done.stdout, done.stderr
