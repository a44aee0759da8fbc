"""One rank of a program under a launcher, with an eye on what it does.

rank_worker.py train RECORDS STOP_AT FLAGS...     trains to step STOP_AT, saves there, and stops
rank_worker.py evaluate FEATURES ARGUMENTS...     evaluates, and keeps the features
"""

import contextlib
import sys
from pathlib import Path

import numpy as np
import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)  # as tests have it

from support.runs import Stopped, distil, last_step, stopping, with_prepare
from tinymim_fast import engine, evaluate
from tinymim_fast.config import parse
from tinymim_fast.distributed import World
from tinymim_fast.errors import end_process
from tinymim_fast.evaluation import knn
from tinymim_fast.tasks import distill

FIRST_GREY, GREY_STEP = 20, 9  # of `numbered_images`, in units of 0..255


def numbers_seen(view: torch.Tensor, config: distill.DistillConfig) -> list[int]:
    """Which of the `numbered_images` a batch holds, by their mean grey."""
    std, mean = (torch.tensor(values).view(3, 1, 1) for values in (config.std, config.mean))
    grey = ((view.float() * std + mean) * 255).mean((1, 2, 3))
    number = (grey - FIRST_GREY) / GREY_STEP
    assert (number - number.round()).abs().max() < 0.35, number
    return number.round().int().tolist()


def train_and_record(world: World, records: Path | None, stop_at: int, flags: list[str]) -> None:
    """A run that saves at `stop_at` and stops there; `records` gets the numbers of the images of each forward pass."""
    config = parse(distill.DistillConfig, flags, "train.py")

    def recording(prepare):
        def prepare_and_record(views):
            with open(records / f"from_{world.world_size}_ranks_{world.rank}.txt", "a") as file:
                file.write(" ".join(map(str, numbers_seen(views[0], config))) + "\n")
            return prepare(views)

        return prepare_and_record

    build_task = with_prepare(distill.build_task, recording) if records else distill.build_task
    num_steps = stop_at - last_step(Path(config.output_dir))
    num_micro_batches = num_steps * config.batch_plan(world.world_size).accumulation_steps
    with contextlib.suppress(Stopped):
        distil(
            world,
            *flags,
            f"--checkpoint-interval={stop_at}",
            build_task=stopping(build_task, num_micro_batches),
        )


class patched:
    """Attributes of an object, replaced within a with block."""

    def __init__(self, target, **new):
        self.target, self.new = target, new

    def __enter__(self):
        self.old = {name: getattr(self.target, name) for name in self.new}
        for name, value in self.new.items():
            setattr(self.target, name, value)

    def __exit__(self, *_):
        for name, value in self.old.items():
            setattr(self.target, name, value)


def main() -> int:
    what, path, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    if what == "train":
        world = engine.start()
        train_and_record(world, Path(path), int(rest[0]), rest[1:])
        engine.stop()
        return 0
    correct = knn.knn_correct

    def keep(train_part, val_part, **options):
        np.savez(
            path,
            **{f"{s}_{k}": t for s, pair in (("train", train_part), ("val", val_part)) for k, t in zip("xy", pair)},
        )
        return correct(train_part, val_part, **options)

    with patched(knn, knn_correct=keep):
        return evaluate.main(rest)


if __name__ == "__main__":
    end_process(main())
