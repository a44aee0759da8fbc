"""Each head's divergence while a student trains: the loss, head by head, and nothing of training changed."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("deepspeed")

from support.programs import TINY, distill_flags
from support.runs import distil, losses
from tinymim_fast.batches import BatchPlan
from tinymim_fast.errors import InputError
from tinymim_fast.training.metrics import read_metrics
from tinymim_fast.training.progress import Progress


@pytest.fixture
def run(world, image_folder, teacher_file, tmp_path):
    def run(name, **changes):
        values = {k: json.dumps(v) if isinstance(v, (list, dict)) else v for k, v in changes.items()}
        flags = distill_flags(
            image_folder, teacher_file, tmp_path / name, **{"epochs": 1, "warmup_epochs": 0, **values}
        )
        distil(world, *flags)
        return tmp_path / name

    return run


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_mean_over_heads_is_the_loss_of_that_step(run, accumulation):
    """What was looked at in steps 2, 4 and 6 is their loss; a run that is not looked at is bitwise the same."""
    changes = {"gradient_accumulation_steps": accumulation, "relations": ["qk", "vv", "kk"], "drop_path": 0.2}
    watched, alone = run("watched", monitor_interval=2, **changes), run("alone", **changes)
    assert losses(watched) == losses(alone)
    records = read_metrics(watched)
    assert [("head_kl" in record) for record in records] == [False, True] * 3
    for record in records[1::2]:
        assert list(record["head_kl"]) == ["qk", "vv", "kk"]
        for relation, heads in record["head_kl"].items():
            assert len(heads) == 3 and len(set(heads)) == 3
            assert np.mean(heads) == pytest.approx(record[relation], rel=1e-4)


def test_heads_of_several_students_and_targets_stand_behind_their_names(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    features = {"kind": "features", "place": "mlp"}
    both = {"kind": "relations", "name": "both", "teacher_block": [2, 3], "student_block": [2, 3], "heads": 3}
    students = [
        {"name": "a", "model_kwargs": TINY, "targets": [both, features]},
        {"name": "b", "model_kwargs": TINY, "relations": ["vv"]},
    ]
    folder = run("run", students=students, monitor_interval=3, log_interval=6, tensorboard="true")
    (record,) = read_metrics(folder)
    names = ["a/both/qk", "a/both/vv", "b/vv"]
    assert list(record["head_kl"]) == names
    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    tags = [tag for tag in accumulator.Tags()["scalars"] if tag.startswith("head_kl")]
    assert sorted(tags) == [f"head_kl/{name}/{head:02d}" for name in names for head in (1, 2, 3)]
    (event,) = accumulator.Scalars("head_kl/b/vv/02")
    assert event.step == 6 and event.value == pytest.approx(record["head_kl"]["b/vv"][1], rel=1e-6)


def test_nothing_to_look_at_is_said(run, tmp_path):
    with pytest.raises(InputError, match=r"--monitor-interval: got 2, but no target compares relations by softmax"):
        run("run", targets=[{"kind": "features", "place": "mlp"}], monitor_interval=2)
    assert not (tmp_path / "run").exists()


def test_heads_are_averaged_over_ranks_and_looks():
    def gather(mine):
        losses, reasons, watched = mine
        return [mine, (losses, reasons, [{name: 3 * heads for name, heads in seen.items()} for seen in watched])]

    progress = Progress(
        SimpleNamespace(gather=gather),
        ("loss",),
        BatchPlan(micro_batch_size=2),
        steps_per_epoch=4,
        bad_files=SimpleNamespace(reasons={}, update=lambda reasons: None),
        start_step=0,
    )
    progress.add(torch.tensor([1.0]), 0.1, {"qk": torch.tensor([1.0, 2.0])})
    progress.add(torch.tensor([1.0]), 0.1, {})
    progress.look()
    progress.add(torch.tensor([1.0]), 0.1, {"qk": torch.tensor([3.0, 6.0])})
    assert progress.record()["head_kl"] == {"qk": [4.0, 8.0]}  # (1 + 3) / 2 and (3 + 9) / 2, then their mean
    progress.add(torch.tensor([1.0]), 0.1)
    assert "head_kl" not in progress.record()
