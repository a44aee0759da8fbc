"""The trial of record: kills, full disks, changes of scale and lost hosts, many more than the tests have time for.

python tests/soak.py [--kills 100] [--record FILE.csv] [--only WORD]

FILE gets a row for each part of a trial: what was tried, how often, and how often it failed; it is rewritten after each
try, and the same command goes on from there, on the same commit.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(1, str(Path(__file__).parent.parent))

from support import kills
from support.inputs import draw_images, save_teacher
from support.programs import ROOT, distill_flags, run_forked, start_forked, start_ranks
from tinymim_fast.errors import EXIT_INPUT
from tinymim_fast.files import whole_file
from tinymim_fast.models.checkpoints import list_checkpoints

COLUMNS = ("fault", "part", "tries", "met", "failed", "seconds", "date", "commit")
KILLED = "SIGKILL while a checkpoint is written, to one rank or two"
FULL_DISK = "the disk is full while a checkpoint is written"
SCALE = "another number of ranks, ZeRO stage and micro-batch"
TWO_HOSTS = "of two hosts (torchrun, a real rendezvous) one is killed"


class Record:
    """The rows of this commit, in a file where one is given, whole after each change.

    Args:
        path: CSV; rows of other commits in it stay. None: rows are printed alone.
    """

    def __init__(self, path: Path | None):
        told = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        self.path, self.commit, self.rows = path, told.stdout.strip(), []
        if path is not None and path.exists():
            with path.open(newline="") as file:
                self.rows = list(csv.DictReader(file))

    def row(self, fault: str, part: str) -> dict:
        """The row of a part; a new one where it was not begun."""
        for row in self.rows:
            if (row["fault"], row["part"], row["commit"]) == (fault, part, self.commit):
                return row
        self.rows.append(dict.fromkeys(COLUMNS, 0) | {"fault": fault, "part": part, "commit": self.commit, "met": ""})
        return self.rows[-1]

    def add(self, row: dict, *, tries: int, met: str, seconds: float, failed: int = 0) -> None:
        """So many more tries of a part, and what they met, in words."""
        row["tries"], row["failed"] = int(row["tries"]) + tries, int(row["failed"]) + failed
        row["seconds"] = round(float(row["seconds"]) + seconds)
        row["met"], row["date"] = met, datetime.now(timezone.utc).date()
        print(*(f"{key}={row[key]}" for key in COLUMNS), sep="  ", flush=True)
        if self.path is not None:
            with whole_file(self.path) as temporary, temporary.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(self.rows)

    @contextlib.contextmanager
    def counted(self, fault: str, part: str, *, tries: int, met: str) -> Iterator[None]:
        """The with block tries this so often; a failure of it is counted and told, and the trial goes on."""
        row, began, failed = self.row(fault, part), time.monotonic(), 0
        try:
            yield
        except Exception:  # whatever it was, it counts
            traceback.print_exc()
            failed = 1
        self.add(row, tries=tries, met=met, seconds=time.monotonic() - began, failed=failed)

    def done(self, fault: str, part: str) -> int:
        """Tries of a part so far."""
        return int(self.row(fault, part)["tries"])


def starter(ranks: int, *flags: str):
    """A function that starts all ranks of a run."""
    return lambda: [start_forked("train", *flags)] if ranks == 1 else start_ranks("train", *flags, ranks=ranks)


def killed(record: Record, folder: Path, images: Path, teacher: Path, count: int) -> None:
    """`count` SIGKILLs for one rank and for two, each followed by the same command; then whole runs are compared."""
    for ranks in (1, 2):
        part = f"{ranks} rank{'s' * (ranks > 1)}"
        row = record.row(KILLED, part)
        met = int(str(row["met"]).partition(" ")[0] or 0)
        rng, rounds = random.Random(ranks + int(row["tries"])), 0
        while int(row["tries"]) < count:
            rounds += 1
            flags = {"checkpoint_interval": 1, "epochs": 10, "seed": rounds, "zero_stage": 2}
            whole, output = folder / f"whole_{ranks}_{rounds}", folder / f"killed_{ranks}_{rounds}"
            start = starter(ranks, *distill_flags(images, teacher, output, **flags))
            tally, began = kills.Tally(), time.monotonic()
            try:
                kills.run_to_end(starter(ranks, *distill_flags(images, teacher, whole, **flags)))
                last = int(list_checkpoints(whole)[-1].name.removeprefix("step_"))
                while int(row["tries"]) < count and (tally.steps or [0])[-1] < last - 2:
                    before, left = tally.kills, tally.in_writing
                    kills.kill_in_writing(start, output, rng, tally)
                    met += tally.in_writing - left
                    said = f"{met} left something half-written"
                    record.add(row, tries=tally.kills - before, met=said, seconds=time.monotonic() - began)
                    began = time.monotonic()
                kills.run_to_end(start)
                kills.assert_same_run(output, whole)
                failed = 0
            except Exception:  # a fault found: it is counted, and the next round goes on
                traceback.print_exc()
                failed = 1
            said = f"{met} left something half-written"
            record.add(row, tries=0, met=said, seconds=time.monotonic() - began, failed=failed)


def full_disks(record: Record, folder: Path, images: Path, teacher: Path) -> None:
    """Room for the first checkpoint and a tenth more of the second each time; space freed, the same command goes on."""
    whole = folder / "whole"
    flags = {"checkpoint_interval": 2, "epochs": 2, "checkpoint_hist": 3}
    kills.run_to_end(starter(1, *distill_flags(images, teacher, whole, **flags)))
    for tenth in range(record.done(FULL_DISK, ""), 10):
        needs = kills.kib_of(whole, num_checkpoints=1 + tenth / 10)
        with (
            record.counted(FULL_DISK, "", tries=1, met="after a first checkpoint"),
            kills.small_disk(folder / f"disk_{tenth}", needs) as disk,
        ):
            flags_here = distill_flags(images, teacher, disk / "run", **flags)
            code, text = run_forked("train", *flags_here)
            assert code == EXIT_INPUT and "can't be saved" in text and "Traceback" not in text, text
            assert list_checkpoints(disk / "run"), "the first one had room"
            kills.assert_complete(disk / "run")
            assert not list((disk / "run").glob("checkpoints/tmp_*")), "something half-written is left"
            kills.resize(disk, 4 * needs)
            kills.run_to_end(starter(1, *flags_here))
            kills.assert_same_run(disk / "run", whole)


def changed_scale(record: Record, folder: Path, images: Path, teacher: Path) -> None:
    """Ranks, ZeRO stage and micro-batch changed at each of five kills."""
    if record.done(SCALE, ""):
        return
    whole, output = folder / "whole", folder / "changed"
    base = {"drop_path": 0, "epochs": 6}
    kills.run_to_end(starter(1, *distill_flags(images, teacher, whole, **base)))
    scales = [(1, 0, 16), (2, 1, 8), (1, 2, 4), (2, 2, 4), (2, 0, 8), (1, 1, 8)]
    with record.counted(SCALE, "", tries=len(scales) - 1, met="losses to 2 %"):
        worst = kills.change_scale(
            lambda **scale: distill_flags(images, teacher, output, **base, **scale),
            scales,
            every=6,
            output_dir=output,
            reference=whole,
        )
        assert worst < 0.02, worst


def lost_hosts(record: Record, folder: Path, images: Path, teacher: Path) -> None:
    """Two launchers, one of them killed with its rank, again and again."""
    changes = {"epochs": 10, "drop_path": 0}
    whole = folder / "whole"
    kills.run_to_end(starter(1, *distill_flags(images, teacher, whole, **changes)))
    for number in range(record.done(TWO_HOSTS, ""), 5):
        output = folder / f"run_{number}"
        flags = distill_flags(images, teacher, output, checkpoint_interval=5, **changes)
        with record.counted(TWO_HOSTS, "", tries=1, met="trained by two, then by one"):
            kills.lose_a_host(flags, output_dir=output, reference=whole, log=folder / f"log_{number}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 1 where a trial failed."""
    parser = argparse.ArgumentParser(prog="python tests/soak.py", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="for one rank, and again for two")
    parser.add_argument("--record", type=Path, help="CSV to add to")
    parser.add_argument("--only", default="", help="trials whose name holds this word")
    args = parser.parse_args(argv)
    trials: dict[str, Callable[..., None]] = {
        FULL_DISK: full_disks,
        SCALE: changed_scale,
        TWO_HOSTS: lost_hosts,
        KILLED: lambda *a: killed(*a, count=args.kills),
    }
    record = Record(args.record)
    with tempfile.TemporaryDirectory(prefix="soak_") as scratch:
        images, teacher = draw_images(Path(scratch) / "images"), save_teacher(Path(scratch) / "teacher.pth")
        for number, (fault, trial) in enumerate(trials.items()):
            if args.only in fault:
                (Path(scratch) / str(number)).mkdir()
                trial(record, Path(scratch) / str(number), images, teacher)
    return int(any(int(row["failed"]) for row in record.rows if row["commit"] == record.commit))


if __name__ == "__main__":
    sys.exit(main())
