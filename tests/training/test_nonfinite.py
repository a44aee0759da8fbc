"""Gradients that are no numbers, and losses that jump: nothing of it passes unseen."""

import math

import pytest
import torch

pytest.importorskip("deepspeed")

from support.programs import distill_flags
from support.runs import distil, last_step, losses
from tinymim_fast.errors import NonFiniteLossError
from tinymim_fast.models.checkpoints import read_weights
from tinymim_fast.tasks import distill
from tinymim_fast.training.metrics import read_metrics


def poisoned(steps, value=math.nan, loss_too=False):
    """A `build_task` whose gradient gets `value` in these steps (from 1), through a loss that stays finite."""

    def build(*args):
        task = distill.build_task(*args)
        forward, calls = task.model.forward, []

        class Poison(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, grad):
                return grad * value

        def poison(*inputs):
            calls.append(1)
            out = forward(*inputs)
            if len(calls) not in steps:
                return out
            return {**out, "loss": out["loss"] * value if loss_too else Poison.apply(out["loss"])}

        task.model.forward = poison
        return task

    return build


@pytest.mark.fault(
    "a step's gradient becomes NaN or Inf though its loss is finite",
    "code 3 at the next look; the step after and the last good checkpoint are named",
    tries=3,
)
@pytest.mark.parametrize(
    ("stage", "bf16", "value"), [(1, "true", math.nan), (2, "false", math.inf), (0, "true", math.nan)]
)
def test_a_gradient_that_is_not_finite_stops_the_run(world, image_folder, teacher_file, tmp_path, stage, bf16, value):
    changes = {"zero_stage": stage, "bf16": bf16, "log_interval": 9, "checkpoint_interval": 3}
    flags = distill_flags(image_folder, teacher_file, tmp_path / "run", **changes)
    with pytest.raises(NonFiniteLossError, match=r"not finite at step 6 .*good checkpoint is .*step_00000003"):
        distil(world, *flags, build_task=poisoned([5], value))
    assert last_step(tmp_path / "run") == 3
    distil(world, *flags)  # with sound numbers, the same command goes on
    assert last_step(tmp_path / "run") == 18


@pytest.mark.fault(
    "gradients or losses become NaN with `--on-nonfinite skip`",
    "the steps are left out and recorded, the schedule goes on; too many end the run with code 3",
    tries=5,
)
@pytest.mark.parametrize(
    ("stage", "bf16", "loss_too"),
    [(1, "true", False), (2, "true", True), (2, "false", False), (3, "true", False), (0, "true", False)],
)
def test_steps_are_skipped_and_recorded(world, image_folder, teacher_file, tmp_path, stage, bf16, loss_too):
    changes = {"zero_stage": stage, "bf16": bf16, "log_interval": 3, "drop_path": 0}
    flags = distill_flags(image_folder, teacher_file, tmp_path / "run", on_nonfinite="skip", **changes)
    distil(world, *flags, build_task=poisoned([5, 8], loss_too=loss_too))
    records = read_metrics(tmp_path / "run")
    assert [r.get("skipped_steps") for r in records] == [None, [5], [8], None, None, None]
    assert [r.get("num_skipped") for r in records] == [None, 1, 2, None, None, None]
    assert all(math.isfinite(r["loss"]) for r in records)
    distil(world, *distill_flags(image_folder, teacher_file, tmp_path / "whole", **changes))
    assert [r["lr"] for r in records] == [r["lr"] for r in read_metrics(tmp_path / "whole")]
    assert losses(tmp_path / "run")[0] == losses(tmp_path / "whole")[0]
    state, _ = read_weights(tmp_path / "run")
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_too_many_skipped_steps_end_the_run(world, image_folder, teacher_file, tmp_path):
    flags = distill_flags(image_folder, teacher_file, tmp_path / "run", on_nonfinite="skip", max_nonfinite=2)
    with pytest.raises(NonFiniteLossError, match="at step 6, and max_nonfinite, 2, were skipped before"):
        distil(world, *flags, build_task=poisoned([3, 4, 6]))


@pytest.mark.fault("the loss jumps to more than three times its average", "the record names step and loss")
def test_spikes_are_recorded(world, image_folder, teacher_file, tmp_path):
    flags = distill_flags(image_folder, teacher_file, tmp_path / "run", epochs=5, lr=1e-6, log_interval=6)
    distil(world, *flags, build_task=poisoned([24], 50.0, loss_too=True))
    found = [r["spikes"] for r in read_metrics(tmp_path / "run") if "spikes" in r]
    assert [list(spikes) for spikes in found] == [["24"]] and found[0]["24"] > 1


@pytest.mark.fault("the loss ends at more than twice its first value", "a warning with both values")
def test_divergence_is_said(world, image_folder, teacher_file, tmp_path, caplog):
    flags = distill_flags(image_folder, teacher_file, tmp_path / "run", epochs=1, lr=1e-6)
    distil(world, *flags, build_task=poisoned([6], 50.0, loss_too=True))
    assert "the run diverged" in caplog.text
