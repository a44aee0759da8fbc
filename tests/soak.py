"""The trial of record: kills, full disks and changes of scale, many more of each than the tests have time for.

python tests/soak.py [--kills 100] [--record FILE.csv]

Prints a line for each kind of fault and appends it to FILE: what was tried, how often, and how often it failed.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(1, str(Path(__file__).parent.parent))

from support import kills
from support.inputs import draw_images, save_teacher
from support.programs import ROOT, distill_flags, run_forked, start_forked, start_ranks
from tinymim_fast.errors import EXIT_INPUT
from tinymim_fast.models.checkpoints import list_checkpoints

COLUMNS = ("fault", "tries", "met", "failed", "seconds", "date", "commit")


def starter(ranks: int, *flags: str):
    """A function that starts all ranks of a run."""
    return lambda: [start_forked("train", *flags)] if ranks == 1 else start_ranks("train", *flags, ranks=ranks)


def killed(folder: Path, images: Path, teacher: Path, count: int) -> dict:
    """`count` SIGKILLs for one rank and for two, each followed by the same command; then whole runs are compared."""
    tallies = {ranks: kills.Tally() for ranks in (1, 2)}
    for ranks, tally in tallies.items():
        rng, rounds = random.Random(ranks), 0
        while tally.kills < count:
            rounds += 1
            flags = {"checkpoint_interval": 1, "epochs": 10, "seed": rounds, "zero_stage": 2}
            whole, output = folder / f"whole_{ranks}_{rounds}", folder / f"killed_{ranks}_{rounds}"
            kills.run_to_end(starter(ranks, *distill_flags(images, teacher, whole, **flags)))
            last = int(list_checkpoints(whole)[-1].name.removeprefix("step_"))
            start = starter(ranks, *distill_flags(images, teacher, output, **flags))
            at = 0
            while tally.kills < count and at < last - 2:
                kills.kill_in_writing(start, output, rng, tally)
                at = tally.steps[-1]
            kills.run_to_end(start)
            kills.assert_same_run(output, whole)
    met = sum(tally.in_writing for tally in tallies.values())
    return {"tries": sum(tally.kills for tally in tallies.values()), "met": f"{met} left something half-written"}


def full_disks(folder: Path, images: Path, teacher: Path) -> dict:
    """Room for the first checkpoint and a tenth more of the second each time; space freed, the same command goes on."""
    whole = folder / "whole"
    flags = {"checkpoint_interval": 2, "epochs": 2, "checkpoint_hist": 3}
    kills.run_to_end(starter(1, *distill_flags(images, teacher, whole, **flags)))
    for tenth in range(10):
        needs = kills.kib_of(whole, num_checkpoints=1 + tenth / 10)
        with kills.small_disk(folder / f"disk_{tenth}", needs) as disk:
            flags_here = distill_flags(images, teacher, disk / "run", **flags)
            code, text = run_forked("train", *flags_here)
            assert code == EXIT_INPUT and "can't be saved" in text and "Traceback" not in text, text
            assert list_checkpoints(disk / "run"), "the first one had room"
            kills.assert_complete(disk / "run")
            assert not list((disk / "run").glob("checkpoints/tmp_*")), "something half-written is left"
            kills.resize(disk, 4 * needs)
            kills.run_to_end(starter(1, *flags_here))
            kills.assert_same_run(disk / "run", whole)
    return {"tries": 10, "met": "10 after a first checkpoint"}


def changed_scale(folder: Path, images: Path, teacher: Path) -> dict:
    """Ranks, ZeRO stage and micro-batch changed at each of five kills."""
    whole, output = folder / "whole", folder / "changed"
    base = {"drop_path": 0, "epochs": 6}
    kills.run_to_end(starter(1, *distill_flags(images, teacher, whole, **base)))
    scales = [(1, 0, 16), (2, 1, 8), (1, 2, 4), (2, 2, 4), (2, 0, 8), (1, 1, 8)]
    worst = kills.change_scale(
        lambda **scale: distill_flags(images, teacher, output, **base, **scale),
        scales,
        every=6,
        output_dir=output,
        reference=whole,
    )
    assert worst < 0.02, worst
    return {"tries": len(scales) - 1, "met": f"losses to {100 * worst:.1f} %"}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 1 where a trial failed."""
    parser = argparse.ArgumentParser(prog="python tests/soak.py", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="for one rank, and again for two")
    parser.add_argument("--record", type=Path, help="CSV to append to")
    args = parser.parse_args(argv)
    trials = {
        "SIGKILL while a checkpoint is written, to one rank or two": lambda *a: killed(*a, count=args.kills),
        "the disk is full while a checkpoint is written": full_disks,
        "another number of ranks, ZeRO stage and micro-batch": changed_scale,
    }
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    failed = 0
    with tempfile.TemporaryDirectory(prefix="soak_") as scratch:
        images, teacher = draw_images(Path(scratch) / "images"), save_teacher(Path(scratch) / "teacher.pth")
        for number, (fault, trial) in enumerate(trials.items()):
            began = time.monotonic()
            folder = Path(scratch) / str(number)
            folder.mkdir()
            try:
                row = {**trial(folder, images, teacher), "failed": 0}
            except AssertionError as error:
                print(f"{fault}: {error}", file=sys.stderr)
                row, failed = {"failed": 1}, 1
            seconds = round(time.monotonic() - began)
            row |= {"fault": fault, "seconds": seconds, "date": datetime.now(timezone.utc).date(), "commit": commit}
            print(*(f"{key}={row.get(key)}" for key in COLUMNS), sep="  ", flush=True)
            if args.record:
                write_row(args.record, row)
    return failed


def write_row(path: Path, row: dict) -> None:
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    sys.exit(main())
