"""What the engine adds to a plain loop, counted."""

import contextlib

import pytest
import torch

pytest.importorskip("deepspeed")

import step_counts


def test_the_default_engine_calls_no_more_operators_than_a_plain_loop_and_reads_nothing(world, tmp_path):
    """bf16 at ZeRO-1, which is what a recipe has."""
    views = tuple(torch.randn(step_counts.BATCH_SIZE, 3, *(step_counts.IMG_SIZE,) * 2) for _ in range(2))
    with contextlib.ExitStack() as opened:
        loops = step_counts.loops("bf16", world, tmp_path, opened, stages=[1])
        counted = {name: step_counts.counts(loop, views) for name, loop in loops.items()}
    plain, ours = counted["plain"], counted["ours, ZeRO-1"]
    assert ours.pop("reads") == 0
    plain.pop("reads")
    assert plain["teacher"] == ours["teacher"] > 100, counted
    assert sum(ours.values()) <= sum(plain.values()), counted
    assert ours["optimizer"] < 40, "a kernel for each parameter: ViT-T has 152"


def test_operators_and_reads_are_told_from_views():
    with step_counts.Count() as count:
        z = torch.ones(2, 3)
        z.t().unsqueeze(0).detach()
        (z + 1).sum().item()
    assert (count.num_operators, count.num_reads) == (3, 1)
