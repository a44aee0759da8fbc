"""How long each stage takes here, and how many epochs fit into the hours: measured once, kept in plan.json."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from study_rows import Row, Sizes
from tinymim_fast.files import write_text
from tinymim_fast.training.metrics import read_metrics

START_S = 15.0  # of a training program, and to end it
EVALUATION_S = 20.0  # of one evaluation, beside its forward passes
FORWARD_SHARE = 1 / 3  # of a fine-tuning step
TEACHER_SHARE = 0.3  # of the hours, at most
NUM_PROBED = 15_000  # images whose features the probes take


@dataclass(frozen=True)
class Plan:
    """What was measured, and what follows from it.

    Args:
        hours: that everything may take.
        seeds: of the students.
        rows: names, in order.
        num_images: to train on.
        bf16: whether it was faster than fp32.
        images_per_s: by stage: "teacher", "finetune", and rows by name.
        teacher_epochs, pretrain_epochs, finetune_epochs: passes over the images.
        estimates_s: seconds of each kind of stage, all its runs together.
    """

    hours: float
    seeds: tuple[int, ...]
    rows: tuple[str, ...]
    num_images: int
    bf16: bool
    images_per_s: Mapping[str, float]
    teacher_epochs: int
    pretrain_epochs: int
    finetune_epochs: int
    estimates_s: Mapping[str, float]

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        write_text(path, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Plan:
        """What `save` wrote."""
        found = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**found, "seeds": tuple(found["seeds"]), "rows": tuple(found["rows"])})

    def describe(self) -> str:
        """For people."""
        total = sum(self.estimates_s.values())
        lines = [
            f"{'bf16' if self.bf16 else 'fp32'}, {self.num_images} images, seeds {', '.join(map(str, self.seeds))}",
            f"epochs: teacher {self.teacher_epochs}, before fine-tuning {self.pretrain_epochs}, fine-tuning "
            f"{self.finetune_epochs}",
        ]
        lines += [f"  {name:18s} {self.images_per_s.get(name, 0):7.0f} images/s" for name in self.images_per_s]
        lines += [f"  {name:18s} {seconds / 60:7.1f} minutes" for name, seconds in self.estimates_s.items()]
        lines.append(f"  {'all':18s} {total / 3600:7.2f} hours, want {self.hours:g}")
        if total > 3600 * self.hours:
            lines.append("One epoch each does not fit: take fewer --rows, or --images-per-class in another folder.")
        return "\n".join(lines)


def make_plan(
    rows: Sequence[Row],
    sizes: Sizes,
    measure: Callable[[str, bool], float],
    *,
    hours: float,
    seeds: Sequence[int],
    num_images: int,
) -> Plan:
    """Measure all stages, fp32 and bf16 where it matters, and fit the epochs into the hours.

    Students get the same number of epochs e before fine-tuning and in it, the largest that fits beside
    `TEACHER_SHARE` of the time; fine-tuning one more where that fits too; the teacher what is left, up to its share.

    Args:
        rows: to be run.
        sizes: of the models.
        measure: images/s of a stage: "teacher", "finetune" or a row's name; and whether in bf16.
        hours: for everything.
        seeds: of the students.
        num_images: to train on.
    """
    compared = [row for row in rows if row.compared]
    trained = [row for row in rows if row.program]
    tried = ("teacher", "finetune", *(row.name for row in trained[:1]))
    rates = {bf16: {stage: measure(stage, bf16) for stage in tried} for bf16 in (False, True)}
    bf16 = sum(1 / rate for rate in rates[True].values()) < sum(1 / rate for rate in rates[False].values())
    found = rates[bf16]
    for row in trained:
        if row.name not in found:
            twin = next((other for other in trained if other.name in found and _costs_the_same(row, other)), None)
            found[row.name] = found[twin.name] if twin else measure(row.name, bf16)
    budget, num = 3600 * hours, len(seeds)
    runs = num * (len(trained) + len(compared)) + 1
    evaluations = num * len(compared) * 2
    forward_s = NUM_PROBED / (found["finetune"] / FORWARD_SHARE)
    fixed_s = runs * START_S + evaluations * (EVALUATION_S + forward_s)
    pretrain_s = num * sum(num_images / found[row.name] for row in trained)
    finetune_s = num * (len(compared)) * num_images / found["finetune"]
    longer_s = num * sum(row.longer for row in compared) * num_images / found["finetune"]
    teacher_s = num_images / found["teacher"]
    left = budget * (1 - TEACHER_SHARE) - fixed_s
    epochs = max(1, int(left / (pretrain_s + finetune_s + longer_s)))
    more = int(left - epochs * (pretrain_s + longer_s) - (epochs + 1) * finetune_s > 0)
    students_s = epochs * (pretrain_s + longer_s) + (epochs + more) * finetune_s
    teacher_epochs = max(1, int(min(TEACHER_SHARE * budget, budget - fixed_s - students_s) / teacher_s))
    return Plan(
        hours=hours,
        seeds=tuple(seeds),
        rows=tuple(row.name for row in rows),
        num_images=num_images,
        bf16=bf16,
        images_per_s={name: round(rate, 1) for name, rate in found.items()},
        teacher_epochs=teacher_epochs,
        pretrain_epochs=epochs,
        finetune_epochs=epochs + more,
        estimates_s={
            "teacher": teacher_epochs * teacher_s,
            "before fine-tuning": epochs * pretrain_s,
            "fine-tuning": (epochs + more) * finetune_s + epochs * longer_s,
            "starts, evaluation": fixed_s,
        },
    )


def _costs_the_same(row: Row, other: Row) -> bool:
    """Rows that differ in nothing that takes time."""

    def cost(of: Row) -> tuple:
        flags = {name: value for name, value in of.flags.items() if name != "drop_path"}
        return of.program, of.student, of.teacher, repr(sorted(flags.items()))

    return cost(row) == cost(other)


def measured_rate(folder: Path) -> float:
    """Images/s of a run that was stopped: the median of its records without the first.

    Raises:
        ValueError: it made too few.
    """
    rates = [record["images_per_s"] for record in read_metrics(folder) if record.get("images_per_s")][1:]
    if not rates:
        raise ValueError(f"{folder}: made too few steps to be timed; give more --measure-seconds")
    return statistics.median(rates)


def seconds_of(records: Sequence[Mapping[str, Any]], batch_size: int) -> float:
    """Of the steps that a run's records tell of, without starts and checkpoints."""
    told = [record for record in records if record.get("images_per_s")]
    steps = [0, *(record["step"] for record in told)]
    return sum((step - before) * batch_size / r["images_per_s"] for before, step, r in zip(steps, steps[1:], told))
