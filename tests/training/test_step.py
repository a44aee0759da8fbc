"""One optimizer step, used alone, as a benchmark uses it."""

import pytest
import torch

pytest.importorskip("deepspeed")

from tinymim_fast.batches import BatchPlan
from tinymim_fast.deepspeed_config import deepspeed_config
from tinymim_fast.engine import Engine
from tinymim_fast.parameter_groups import parameter_groups
from tinymim_fast.training.step import TrainStep


class Squares(torch.nn.Module):
    """The mean square of a linear layer's answer, as "loss"; its square as "other"."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, x):
        loss = self.linear(x).square().mean()
        return {"loss": loss, "other": loss**2}


@pytest.mark.parametrize("accumulation_steps", [1, 3])
def test_a_step_is_adamw_on_the_mean_over_micro_batches(world, accumulation_steps):
    """Against PyTorch in fp64, and the losses that it returns."""
    batches = BatchPlan(micro_batch_size=8, accumulation_steps=accumulation_steps)
    model, oracle = Squares(), Squares().double()
    engine = Engine(
        model, deepspeed_config(batches, zero_stage=1, bf16=False), world, lr_at=lambda step: 0.01, weight_decay=0.1
    )
    step = TrainStep(
        engine, lambda views: (2 * views[0],), parts=("loss", "other"), accumulation_steps=accumulation_steps
    )
    adamw = torch.optim.AdamW(parameter_groups(oracle.parameters(), 0.1), lr=0.01, betas=(0.9, 0.95))
    images = torch.randn(2, accumulation_steps, 8, 4, generator=torch.Generator().manual_seed(0))
    for micro_batches in images:
        losses = step(iter([(views,) for views in micro_batches]))
        wanted = [oracle(2 * views.double()) for views in micro_batches]
        sum(out["loss"] / accumulation_steps for out in wanted).backward()
        adamw.step()
        adamw.zero_grad()
        means = [sum(out[part] for out in wanted) / accumulation_steps for part in ("loss", "other")]
        torch.testing.assert_close(losses.double(), torch.stack(means).detach(), rtol=1e-6, atol=1e-7)
        assert not losses.requires_grad
    for name, parameter in oracle.named_parameters():
        torch.testing.assert_close(engine.trained_state()[name].double(), parameter.detach(), rtol=1e-6, atol=1e-7)


def test_inputs_are_prepared_without_gradients_in_the_engines_dtype(world):
    seen = []

    def prepare(views):
        seen.append((torch.is_grad_enabled(), views[0].dtype))
        return views

    engine = Engine(
        Squares(),
        deepspeed_config(BatchPlan(micro_batch_size=8), zero_stage=1, bf16=True),
        world,
        lr_at=lambda step: 0.01,
    )
    TrainStep(engine, prepare, parts=("loss",), accumulation_steps=1)(iter([(torch.randn(8, 4),)]))
    assert seen == [(False, torch.bfloat16)]
