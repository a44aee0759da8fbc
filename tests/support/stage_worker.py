"""Two ranks or more at every ZeRO stage: torchrun stage_worker.py RESULTS writes a line of JSON for each setting.

error: largest distance of a weight from plain PyTorch's in fp64 after STEPS steps on the same samples. reads: how
often the last two steps asked a device for a number; in the first ZeRO-3 compares the order of modules among ranks.
"""

import contextlib
import json
import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)  # as tests have it

from support.operators import CountReads
from tinymim_fast import engine as engines
from tinymim_fast.batches import BatchPlan
from tinymim_fast.deepspeed_config import deepspeed_config
from tinymim_fast.training.step import TrainStep

STEPS, BATCH, ACCUMULATION = 4, 8, 2


class Network(torch.nn.Module):
    """Sizes that two ranks don't divide evenly."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.GELU(), torch.nn.Linear(5, 3))

    def forward(self, x):
        return {"loss": self.layers(x).square().mean(dtype=torch.promote_types(x.dtype, torch.float32))}


def lr_at(step):
    return 0.01 * (step + 1)


def batch_of(step, world_size):
    """(accumulation, ranks, B, 4)"""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(ACCUMULATION, world_size, BATCH, 4, generator=generator)


def plain(world_size, clip, skipped=None):
    """The weights after plain PyTorch in fp64, without one of the steps."""
    model = Network().double()
    adamw = torch.optim.AdamW(engines.parameter_groups(model.parameters(), 0.1), lr=0, betas=(0.9, 0.95))
    for step in range(STEPS):
        if step == skipped:
            continue
        for group in adamw.param_groups:
            group["lr"] = lr_at(step)
        model(batch_of(step, world_size).double())["loss"].backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        adamw.step()
        adamw.zero_grad()
    return model.state_dict()


def run(world, clip, poisoned, bf16, stage, exact):
    """One setting; its row."""
    batches = BatchPlan(micro_batch_size=BATCH, accumulation_steps=ACCUMULATION, world_size=world.world_size)
    options = {"zero_stage": stage, "bf16": bf16, "clip_grad": clip, "skip_nonfinite": poisoned is not None}
    config = deepspeed_config(batches, **options)
    if stage == 3:  # else weights as small as these are never divided
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    engine = engines.Engine(Network(), config, world, lr_at=lr_at, weight_decay=0.1)
    step = TrainStep(engine, lambda views: views, parts=("loss",), accumulation_steps=ACCUMULATION)
    reads, skipped = CountReads(), []
    for number in range(STEPS):
        views = batch_of(number, world.world_size)
        if number == poisoned:
            views[1, 1] = torch.nan  # of the second micro-batch, on rank 1 alone
        with reads if number >= STEPS - 2 else contextlib.nullcontext():
            step(iter([(view[world.rank],) for view in views]))
        if not engine.step_applied:
            skipped.append(number)
    state = engine.trained_state()
    error = max((state[name].double() - exact[name]).abs().max().item() for name in exact)
    skipped = world.gather(skipped)
    return {
        "clip": clip,
        "bf16": bf16,
        "stage": stage,
        "poisoned": poisoned,
        "error": error,
        "reads": reads.count,
        "skipped": skipped,
    }


def main():
    torch.set_num_threads(1)
    world = engines.start()
    # Clipping, and whether rank 1 has images of no numbers in one step, which all ranks then skip.
    for clip, poisoned in ((0.0, None), (0.05, None), (0.0, 1)):
        exact = plain(world.world_size, clip, poisoned)
        for bf16 in (False, True):
            for stage in range(4):
                row = run(world, clip, poisoned, bf16, stage, exact)
                if world.is_main:
                    with open(sys.argv[1], "a") as file:
                        file.write(json.dumps(row) + "\n")
    engines.stop()


if __name__ == "__main__":
    main()
