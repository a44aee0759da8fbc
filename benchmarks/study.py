"""The paper's comparisons on real images, as large as two cores have them: which pre-training helps a small student.

python benchmarks/study.py --data-path cifar10.tar.xz --output-dir DIR --plan     measures, and says what will be run
python benchmarks/study.py --data-path cifar10.tar.xz --output-dir DIR --max-time 60     runs an hour of it; again: on

A masked autoencoder, the teacher, then students of several kinds (study_rows.py), three seeds each, equal steps; each
stage is a run of pretrain.py, train.py, finetune.py or evaluate.py in a folder of its own, and a stage that is done is
not begun again. benchmarks/results/study/ gets a CSV, a table and a picture of what there is so far. Only the final
evaluation sees the validation images; --held-out takes a tenth of the training images in their place, to choose on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness  # noqa: F401 (a checkout needs no installation)
import study_report
from study_images import prepare_images, unpack
from study_plan import START_S, Plan, make_plan, measured_rate, seconds_of
from study_rows import Row, Sizes, chosen, distil_flags, finetune_flags, pretrain_flags, rows
from tinymim_fast.errors import EXIT_INPUT, EXIT_TERMINATED, InputError
from tinymim_fast.evaluate import evaluate
from tinymim_fast.evaluation.report import write_report
from tinymim_fast.models.checkpoints import latest_checkpoint
from tinymim_fast.stages import HERE as PACKAGE
from tinymim_fast.stages import end_with_parent
from tinymim_fast.training.metrics import read_metrics

ALL_ROWS = rows(Sizes())
RESULTS = Path(__file__).parent / "results" / "study"
MIN_PART_S = 60.0  # less is not worth starting a program for
KNN = (20,)


class OutOfTime(Exception):
    """--max-time is over; the same command goes on."""


@dataclass
class Study:
    """Everything that a stage needs.

    Args:
        out: folder of all runs.
        images: folder with train/ and val/.
        sizes: of the models.
        rows: to run, teachers before their students.
        ends: when no more is begun, of `time.monotonic`; None: never.
        run: starts a program, by default as its users do.
    """

    out: Path
    images: Path
    sizes: Sizes
    rows: Sequence[Row]
    ends: float | None = None
    run: Any = None

    def left_s(self) -> float:
        """Seconds that are left."""
        return float("inf") if self.ends is None else self.ends - time.monotonic()

    def folder(self, stage: str, seed: int | None = None) -> Path:
        """Of a stage's run."""
        return self.out / (stage if seed is None else f"{stage}_seed{seed}")

    # --- programs

    def start(self, program: str, folder: Path, flags: Mapping[str, Any], minutes: float | None = None) -> int:
        """The exit code of a training program; its output goes to `folder`.log.

        Args:
            program: "train.py", "pretrain.py" or "finetune.py".
            folder: of the run.
            flags: of the program.
            minutes: after which it saves and stops; by default those that are left.
        """
        if minutes is None and self.ends is not None:
            minutes = self.left_s() / 60
        given = {"data_path": self.images, "output_dir": folder, **flags}
        given |= {} if minutes is None else {"max_time": round(minutes, 3)}
        command = [program, *(_flag(name, value) for name, value in given.items())]
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_name(f"{folder.name}.log"), "a", encoding="utf-8") as log:
            return (self.run or start_program)(command, log)

    def train(self, program: str, folder: Path, flags: Mapping[str, Any], num_steps: int) -> None:
        """Run a program to its end, unless it is there already.

        Raises:
            OutOfTime: it was stopped, and saved.
            subprocess.CalledProcessError: it failed.
        """
        if last_step(folder) >= num_steps:
            return
        if self.left_s() < MIN_PART_S:
            raise OutOfTime
        print(f"{folder.name}: {program}, {num_steps} steps", flush=True)
        code = self.start(program, folder, flags)
        if code == EXIT_TERMINATED:
            raise OutOfTime
        if code:
            raise subprocess.CalledProcessError(code, [program, str(folder)])

    def evaluate(self, folder: Path, checkpoint: Path, metrics: Sequence[str], data_path: Path) -> dict[str, Any]:
        """Results by metric, from results.json where they are there already.

        Raises:
            OutOfTime: too little time is left.
        """
        file = folder / "results.json"
        if not file.is_file():
            if self.left_s() < MIN_PART_S:
                raise OutOfTime
            print(f"{folder.name}: evaluation", flush=True)
            found = evaluate(str(checkpoint), str(data_path), metrics=metrics, nb_knn=KNN, batch_size=256)
            write_report(folder, found)
        return json.loads(file.read_text(encoding="utf-8"))["results"]

    # --- stages

    def flags_of(self, stage: str, seed: int) -> tuple[str, dict[str, Any]]:
        """Program and flags of a stage before fine-tuning: "teacher" or a row's name."""
        if stage == "teacher":
            return "pretrain.py", pretrain_flags(self.sizes, "teacher")
        row = next(row for row in self.rows if row.name == stage)
        if row.program == "pretrain.py":
            return row.program, {**pretrain_flags(self.sizes, row.student), "seed": seed}
        teacher = self.folder("teacher") if row.teacher == "teacher" else self.folder(row.teacher, seed)
        return row.program, {**distil_flags(self.sizes, row), "teacher_checkpoint": teacher, "seed": seed}

    def measure(self, stage: str, bf16: bool, seconds: float) -> float:
        """Images/s of a stage, from a run that is thrown away; its teacher is the one that was measured before it."""
        folder = self.out / "measured" / f"{stage}_{'bf16' if bf16 else 'fp32'}"
        if not folder.exists():
            print(f"measuring {folder.name}", flush=True)
            program, flags = self._measured_flags(stage)
            flags |= {"bf16": bf16, "epochs": 100, "log_interval": 5}
            code = self.start(program, folder, flags, minutes=(START_S + seconds) / 60)
            if code not in (0, EXIT_TERMINATED):
                raise subprocess.CalledProcessError(code, [program, str(folder)])
        return measured_rate(folder)

    def _measured_flags(self, stage: str) -> tuple[str, dict[str, Any]]:
        measured = self.out / "measured"
        if stage == "finetune":
            fresh = next(row for row in self.rows if not row.program)
            return "finetune.py", {**finetune_flags(self.sizes, fresh), "checkpoint": "none"}
        program, flags = self.flags_of(stage, 0)
        if "teacher_checkpoint" in flags:
            teacher = next(row.teacher for row in self.rows if row.name == stage)
            places = (measured / f"{teacher}_{precision}" for precision in ("fp32", "bf16"))
            flags["teacher_checkpoint"] = next(place for place in places if place.exists())
        return program, flags

    def run_all(self, plan: Plan, report: study_report.Report) -> None:
        """Every stage that is not done, and after each row the report.

        Raises:
            OutOfTime: see `train`.
            subprocess.CalledProcessError: a program failed.
        """
        precision = {"bf16": plan.bf16}
        steps = plan.num_images // self.sizes.batch_size
        if any(row.program == "train.py" for row in self.rows):
            program, flags = self.flags_of("teacher", 0)
            flags |= {**precision, "epochs": plan.teacher_epochs, "warmup_epochs": min(1.0, plan.teacher_epochs / 4)}
            self.train(program, self.folder("teacher"), flags, steps * plan.teacher_epochs)
            probed = self.evaluate(
                self.out / "teacher_probes", self.folder("teacher"), ("knn", "linear"), self.out / "probed"
            )
            seconds = seconds_of(read_metrics(self.folder("teacher")), self.sizes.batch_size)
            report.add(plan, None, 0, probed, seconds=seconds, epochs=f"teacher {plan.teacher_epochs}")
        for group in dict.fromkeys(row.group for row in self.rows):
            for seed in plan.seeds:
                for row in (row for row in self.rows if row.group == group):
                    self._run_row(plan, row, seed, steps, report)

    def _run_row(self, plan: Plan, row: Row, seed: int, steps: int, report: study_report.Report) -> None:
        precision, source, probes = {"bf16": plan.bf16}, "none", {}
        if row.program:
            source = self.folder(row.name, seed)
            program, flags = self.flags_of(row.name, seed)
            epochs = {"epochs": plan.pretrain_epochs}
            self.train(program, source, {**flags, **precision, **epochs}, steps * plan.pretrain_epochs)
        if not row.compared:
            return
        if row.program:
            where = self.out / f"{source.name}_probes"
            probes = self.evaluate(where, source, ("knn", "linear"), self.out / "probed")
        epochs = plan.finetune_epochs + (plan.pretrain_epochs if row.longer else 0)
        tuned = self.folder(f"{row.name}_finetuned", seed)
        flags = {**finetune_flags(self.sizes, row), **precision, "epochs": epochs, "seed": seed, "checkpoint": source}
        self.train("finetune.py", tuned, flags, steps * epochs)
        top1 = self.evaluate(self.out / f"{tuned.name}_top1", tuned, ("top1",), self.images)
        folders = [tuned, source] if row.program else [tuned]
        seconds = sum(seconds_of(read_metrics(folder), self.sizes.batch_size) for folder in folders)
        said = f"before fine-tuning {plan.pretrain_epochs}, fine-tuning {plan.finetune_epochs}"
        report.add(plan, row, seed, {**probes, **top1}, seconds=seconds, epochs=said)


def start_program(command: Sequence[str], log: Any) -> int:
    """The exit code of `python tinymim_fast/PROGRAM FLAGS...`, whose output goes to `log`.

    It saves and ends when this process is interrupted, or, on Linux, killed.
    """
    program, *flags = command
    print("$", program, *flags, file=log, flush=True)
    process = subprocess.Popen(
        [sys.executable, str(PACKAGE / program), *flags],
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that Ctrl-C reaches it by this process alone
        preexec_fn=end_with_parent,
    )
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


def last_step(folder: Path) -> int:
    """Of a run's newest checkpoint; 0 where there is none."""
    latest = latest_checkpoint(folder)
    return int(latest.name.removeprefix("step_")) if latest else 0


def _flag(name: str, value: Any) -> str:
    text = str(value) if isinstance(value, (str, Path)) else json.dumps(value)
    return f"--{name.replace('_', '-')}={text}"


def read_plan(study: Study, args: argparse.Namespace) -> Plan:
    """The plan that the folder has, or a new one."""
    path = args.output_dir / "plan.json"
    names = tuple(row.name for row in study.rows)
    if path.is_file():
        plan = Plan.load(path)
        if set(names) - set(plan.rows):
            raise InputError(
                f"{path}: was made for other rows; choose another folder, or leave --rows out", argument="--output-dir"
            )
        return plan
    num_images = sum(1 for _ in (study.images / "train").glob("*/*"))
    plan = make_plan(
        study.rows,
        study.sizes,
        lambda stage, bf16: study.measure(stage, bf16, args.measure_seconds),
        hours=args.hours,
        seeds=args.seeds,
        num_images=num_images,
    )
    plan.save(path)
    shutil.rmtree(study.out / "measured", ignore_errors=True)
    return plan


def main(argv: Sequence[str] | None = None, *, sizes: Sizes | None = None, run: Any = None) -> int:
    """The command line; returns the exit code.

    Args:
        argv: None for the command line's.
        sizes: of the models; default the study's.
        run: see `Study`.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-path", type=Path, required=True, help="folder with train/<class>/ and val/<class>/, or its archive")
    add("--output-dir", type=Path, required=True, help="for all runs")
    add("--results", type=Path, default=RESULTS, help="folder of CSV, table and picture (default: %(default)s)")
    add("--plan", action="store_true", help="measure, say what will be run, and end")
    add("--hours", type=float, default=4.0, help="that all of it may take")
    add("--measure-seconds", type=float, default=60.0, help="of each stage, for the plan")
    add("--max-time", type=float, metavar="MINUTES", help="save and end after so many; the same command goes on")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--rows", nargs="+", metavar="ROW", choices=[row.name for row in ALL_ROWS], help="default: all")
    add("--held-out", action="store_true", help="validate on a tenth of the training images, to choose on")
    add("--images-per-class", type=int, help="to train on; of a new output folder (default: all)")
    args = parser.parse_args(argv)
    sizes = sizes or Sizes()
    out = args.output_dir = args.output_dir.resolve()
    for row in ALL_ROWS:
        if row.missing and (not args.rows or row.name in args.rows):
            print(f"left out, train.py has no {', '.join(row.missing)}: {row.name}")
    try:
        images = prepare_images(
            unpack(args.data_path, out), out, held_out=args.held_out, per_class=args.images_per_class
        )
        ends = None if args.max_time is None else time.monotonic() + 60 * args.max_time
        study = Study(out, images, sizes, list(chosen(sizes, args.rows)), ends, run)
        plan = read_plan(study, args)
        print(plan.describe(), flush=True)
        if args.plan:
            return 0
        report = study_report.Report(args.results, sizes)
        study.run_all(plan, report)
    except InputError as error:
        print(f"study: {error}", file=sys.stderr)
        return EXIT_INPUT
    except (OutOfTime, KeyboardInterrupt):
        print("stopped; the same command goes on")
        return EXIT_TERMINATED
    except subprocess.CalledProcessError as error:
        print(f"study: {error.cmd[0]} ended with code {error.returncode}: {error.cmd[-1]}.log", file=sys.stderr)
        return 1
    print(f"{args.results}: {', '.join(sorted(path.name for path in args.results.iterdir()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
