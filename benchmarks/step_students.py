"""Two students of one teacher: B -> S and B -> T with one teacher pass a batch, and one after the other."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

import harness
from step_loops import PRECISIONS, as_trained, config_of
from tinymim_fast.distributed import World
from tinymim_fast.tasks.distill import DistillConfig

STUDENTS = "B-S+B-T"


class StudentsPoint(Protocol):
    """What is read of a point of train_step.py."""

    pair: str
    precision: str
    teacher_precision: str
    zero_stage: int
    batch_size: int
    img_size: int


def configurations(point: StudentsPoint, folder: Path) -> tuple[DistillConfig, dict[str, DistillConfig]]:
    """Of the run of both, and of each alone by its name; of one teacher, which is written to `folder`."""
    names = ("batch_size", "precision", "img_size", "zero_stage", "teacher_precision")
    options = {name: getattr(point, name) for name in names}
    alone = {pair: config_of(pair, folder, **options) for pair in point.pair.split("+")}
    students = [
        {"name": pair, "model": config.student_model, "model_kwargs": config.student_model_kwargs}
        for pair, config in alone.items()
    ]
    first = next(iter(alone.values()))
    return replace(first, students=tuple(json.loads(json.dumps(students)))), alone


def measure_students(
    point: StudentsPoint,
    world: World,
    folder: Path,
    opened: ExitStack,
    *,
    seconds: float = 10.0,
    num_repeats: int | None = None,
) -> Mapping[str, dict[str, Any]]:
    """The columns of "together" and of "apart": a step of all students on one batch, images counted once.

    Losses of a student together that are not those alone fail the gate. Compilers are closed with `opened`.
    """
    device, dtype = world.device, PRECISIONS[point.precision]
    both, alone = configurations(point, folder)
    together = as_trained(both, world, opened)
    apart = {name: as_trained(config, world, opened) for name, config in alone.items()}
    generator = torch.Generator(device).manual_seed(2)
    shape = point.batch_size, 3, point.img_size, point.img_size
    as_loaded = torch.float16 if both.bf16 and device.type == "cuda" else torch.float32
    views = [tuple(torch.randn(2, *shape, device=device, generator=generator).to(as_loaded)) for _ in range(3)]
    batches = itertools.cycle(views)

    def losses(trained: tuple) -> dict[str, torch.Tensor]:
        """Without drop path."""
        task, engine, _ = trained
        task.model.eval()
        with torch.no_grad():
            found = engine.forward(*task.prepare(tuple(view.to(engine.dtype) for view in views[0])))
        task.model.train()
        return found

    found = losses(together)
    errors = [
        harness.relative_error(found[f"{name}/loss"], losses(trained)["loss"].double())
        for name, trained in apart.items()
    ]
    gated = {
        "loss_error": float(f"{max(errors):.2e}"),
        "status": harness.OK if harness.passes_gate(max(errors), 0.0, dtype) else harness.FAILED_GATE,
        "teacher_dtype": together[0].frozen.settings["teacher_precision"],
    }

    def one_after_the_other() -> None:
        batch = next(batches)
        for _, _, step in apart.values():
            step(iter([batch]))

    steps = {"together": lambda: together[2](batches), "apart": one_after_the_other}
    timing = {"device": device, "num_repeats": num_repeats}
    measured = harness.measure(steps, lambda name: dict(gated), seconds=seconds, **timing)
    for columns in measured.values():
        if columns.get("step_ms"):
            columns["images_per_s"] = round(1e3 * point.batch_size / columns["step_ms"], 2)
    return measured
