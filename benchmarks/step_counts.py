"""How many operators a step of ViT-S -> ViT-T calls, and what the engine costs over a plain PyTorch loop.

python benchmarks/step_counts.py              # counts, which are the same on every machine
python benchmarks/step_counts.py --time       # and milliseconds of steps that do next to nothing: 4 images of 5 tokens

Counted are operators that are no views: on a GPU each is a kernel or a few; also how often the host asks for a number
of the device. Compared with the plain loop of step_loops.py, all with the same student, teacher and loss.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import harness
import machine
import step_loops
from tinymim_fast import engine as engines
from tinymim_fast.distributed import World

READS = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.item")
# Neither compute nor launch anything.
FREE = ("aten.empty", "aten.new_empty", "aten.detach", "aten.lift_fresh", "aten._local_scalar_dense")
IMG_SIZE, BATCH_SIZE = 32, 4


class Count(TorchDispatchMode):
    """Counts operators that are no views and do something, and reads of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.num_operators = self.num_reads = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Calls it."""
        name = str(function)
        self.num_operators += not function.is_view and not name.startswith(FREE)
        self.num_reads += name.startswith(READS)
        return function(*args, **(kwargs or {}))


def loops(
    precision: str, world: World, folder: Path, opened: ExitStack, stages: Sequence[int] = (0, 1, 2, 3)
) -> dict[str, step_loops.Loop]:
    """The plain loop, and ours at some ZeRO stages."""
    of_point = {"batch_size": BATCH_SIZE, "precision": precision, "img_size": IMG_SIZE, "compile": "false"}
    plain = step_loops.config_of("S-T", folder, **of_point)
    found = {"plain": step_loops.plain(plain, world, opened)}
    for stage in stages:
        config = step_loops.config_of("S-T", folder, **of_point, zero_stage=stage)
        found[f"ours, ZeRO-{stage}"] = step_loops.ours(config, world, opened)
    return found


def counts(loop: step_loops.Loop, views: step_loops.Views) -> dict[str, int]:
    """Operators of a step's parts, and its reads of the device; in its first steps ZeRO-3 learns the modules' order."""
    for _ in range(3):
        loop.step(iter([views]))
    found, reads = {}, 0
    inputs = loss = None
    for part in ("teacher", "forward", "backward", "optimizer"):
        with Count() as count:
            if part == "teacher":
                with torch.no_grad():
                    inputs = loop.prepare(views)
            elif part == "forward":
                loss = loop.forward(*inputs)
            elif part == "backward":
                loop.backward(loss)
            else:
                loop.update()
        found[part], reads = count.num_operators, reads + count.num_reads
    return {**found, "reads": reads}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table for each precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", nargs="+", choices=list(step_loops.PRECISIONS), default=["bf16", "fp32"])
    parser.add_argument("--time", action="store_true", help="steps too, in alternation")
    args = parser.parse_args(arguments)
    logging.getLogger("tinymim_fast").setLevel(logging.ERROR)
    world = engines.start()
    views = tuple(torch.randn(BATCH_SIZE, 3, IMG_SIZE, IMG_SIZE, device=world.device) for _ in range(2))
    for precision in args.precisions:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
            compared = loops(precision, world, Path(folder), opened)
            rows = {name: counts(loop, views) for name, loop in compared.items()}
            if args.time:
                steps = {name: lambda loop=loop: loop.step(itertools.repeat(views)) for name, loop in compared.items()}
                for name, times in harness.time_interleaved(steps, device=world.device).items():
                    rows[name]["ms"] = times["step_ms"]
        cells = [(precision, *next(iter(rows.values())))]
        cells += [(name, *map(str, row.values())) for name, row in rows.items()]
        print(machine.aligned(cells), flush=True)
    engines.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
