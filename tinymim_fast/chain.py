"""Students one after another, each the teacher of the next: L -> B -> S -> T.

python -m tinymim_fast.chain CHAIN --data-path DIR --teacher-checkpoint FILE --output-dir DIR [--launcher "FLAGS"] \
    [--FIELD VALUE ...]

CHAIN is a YAML file or a packaged one, `tinymim_chain`. Its keys: `stages`, from a name to the keys of a run of
train.py, `config: RECIPE` among them; `output_dir`; `teacher_checkpoint`, of the first; `launcher`, the flags of
`deepspeed`; and any key of a run, for all stages. Flags are for all stages too. The last of these wins: a stage's
recipe, the chain's keys, the stage's keys, flags.

    OUTPUT_DIR/
        base/ small/ tiny/        the stages, runs as train.py leaves them
        base.log small.log ...    what they and the launcher said
        chain.md chain.json       all stages in one table
        chain.png                 their losses
        run.lock                  one chain at a time
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinymim_fast.config import RECIPES, check_keys, find_recipe, parse
from tinymim_fast.errors import EXIT_INPUT, EXIT_TERMINATED, InputError, Terminated, flags
from tinymim_fast.stages import Stages, launch, tell_failure
from tinymim_fast.tasks.distill import DistillConfig, which_teacher
from tinymim_fast.yaml_files import read_mapping

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

CHAINS = RECIPES / "chains"
OF_A_CHAIN = ("stages", "launcher")
SET_HERE = ("output_dir", "teacher_checkpoint")  # of each stage
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
ENDING_S = 120  # patience with a stage that a killed chain left and that is saving


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One run of a chain.

    Args:
        name: of its folder in the chain's.
        flags: of train.py.
        config: what they mean.
    """

    name: str
    flags: tuple[str, ...]
    config: DistillConfig

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self.config.output_dir)

    @property
    def log(self) -> Path:
        """What its program and the launcher said, beside the folder."""
        return self.folder.with_name(f"{self.name}.log")


@contextmanager
def named(stage: str) -> Iterator[None]:
    """Errors inside the with block name a stage, and keys of YAML instead of flags."""
    try:
        yield
    except InputError as error:
        key = (error.argument or "").removeprefix("--").replace("-", "_")
        error.argument = f"stage {stage}: {key}" if key else f"stage {stage}"
        raise


def read_chain(name: str, given: Mapping[str, Any], argv: Sequence[str]) -> tuple[list[Stage], list[str]]:
    """The stages in their order, and the launcher's flags.

    Args:
        name: of a YAML file, or of a packaged chain.
        given: `output_dir`, `teacher_checkpoint` and `launcher` from the command line, where they stand there.
        argv: further flags, for all stages.

    Raises:
        InputError: an unknown key, a missing one or a value that can't be; names the stage.
    """
    names = [f.name for f in fields(DistillConfig)]
    with flags(name="CHAIN", path="CHAIN"):
        path = find_recipe(name, CHAINS)
        keys = {key.replace("-", "_"): value for key, value in read_mapping(path).items()}
        check_keys(keys, [*OF_A_CHAIN, *names], path)
    keys |= given
    launcher = keys.pop("launcher", [])
    if not isinstance(launcher, list) or not all(isinstance(flag, str) for flag in launcher):
        raise InputError(f"got {launcher}, want a list of flags of deepspeed, as [--num_gpus=8]", argument="launcher")
    runs = keys.pop("stages", None)
    if not isinstance(runs, dict) or not runs or not all(isinstance(run, dict) for run in runs.values()):
        raise InputError(
            f"{path}: want names with keys of a run each, base: {{config: tinymim_base}}", argument="stages"
        )
    for key in SET_HERE:
        if not isinstance(keys.get(key), str):
            raise InputError(f"got {keys.get(key)}, want a path, in {path} or as a flag", argument=key)
    output_dir, teacher = (keys.pop(key) for key in SET_HERE)
    stages: list[Stage] = []
    for stage, run in runs.items():
        with named(stage):
            run = {key.replace("-", "_"): value for key, value in run.items()}
            if not NAME.fullmatch(stage):
                raise InputError("want a name of letters, digits, - and _", argument="stages")
            for key in SET_HERE:
                if key in run:
                    raise InputError(f"got {run[key]}, but the chain sets it; leave it out here", argument=key)
            with flags(path=None):
                check_keys(run, ["config", *names], path)
            run |= {"output_dir": str(Path(output_dir) / stage), "teacher_checkpoint": teacher}
            recipe = [f"--config={run.pop('config')}"] if "config" in run else []
            argv_of_run = (*recipe, *map(as_flag, keys.items()), *map(as_flag, run.items()), *argv)
            config = parse(DistillConfig, argv_of_run, "chain")
        stages.append(Stage(name=stage, flags=argv_of_run, config=config))
        teacher = config.output_dir
    return stages, launcher


def as_flag(item: tuple[str, Any]) -> str:
    """A key and its value as a flag of a program."""
    key, value = item
    return f"--{key.replace('_', '-')}={value if isinstance(value, str) else json.dumps(value)}"


def check_fit(stages: Sequence[Stage], num_finished: int) -> None:
    """Refuse a chain in which a teacher doesn't fit its student, before anything is trained.

    Args:
        stages: all.
        num_finished: of them; what the first of the others learns from is loaded, if it is no stage.

    Raises:
        InputError: widths, heads, tokens or names that don't go together; names the stage and the key.
    """
    import torch

    from tinymim_fast.models.checkpoints import describe
    from tinymim_fast.models.vit import create_vit, head_layout
    from tinymim_fast.tasks.build_students import build_students
    from tinymim_fast.tasks.distill import load_teacher

    before: tuple[Stage, dict[str, Any]] | None = None
    for number, stage in enumerate(stages):
        config = stage.config
        with named(stage.name):
            if config.students is not None and number + 1 < len(stages):
                raise InputError(
                    "got several, but the next stage learns from one; put them into the last stage", argument="students"
                )
            if before is not None:
                with torch.device("meta"):
                    teacher, layout = of_stage(*before, config), before[1]
            elif num_finished == 0:
                teacher, info, _ = load_teacher(config)
                layout = info.head_layout
            else:  # what it learnt from need not be there any more
                with torch.device("meta"):
                    vit = create_vit(
                        config.student_model, **{**config.student_model_kwargs, "img_size": config.img_size}
                    )
                heads = config.relation_heads or describe(stage.folder).head_layout.get("relation_heads")
                before = stage, {**head_layout(vit), "relation_heads": heads}
                continue
            with torch.device("meta"):
                students = build_students(config, teacher, layout)
        before = stage, students[0].info["head_layout"]


def of_stage(before: Stage, layout: Mapping[str, Any], config: DistillConfig) -> VisionTransformer:
    """The student of the stage `before` as the teacher that `config` asks for, without its weights.

    Raises:
        InputError: it is another model, or has other heads.
    """
    from tinymim_fast.models.vit import check_heads, create_vit

    own = before.config
    if config.teacher_model not in (None, own.student_model):
        raise InputError(
            f"got {config.teacher_model}, but stage {before.name} trains a {own.student_model}; leave it out",
            argument="teacher_model",
        )
    with flags(model="teacher_model", model_kwargs="teacher_model_kwargs"):
        kwargs = {**own.student_model_kwargs, **config.teacher_model_kwargs, "img_size": config.img_size}
        vit = create_vit(own.student_model, **kwargs)
        check_heads(vit, layout["num_heads"], f"stage {before.name}")
    return vit


def count_finished(stages: Sequence[Stage]) -> int:
    """How many stages from the first on are finished and can stay.

    Raises:
        InputError: the folder of a stage holds a run of another configuration, or of another teacher than the stage
            before is now.
    """
    from tinymim_fast.files import differing
    from tinymim_fast.models.checkpoints import WEIGHTS, describe, latest_checkpoint
    from tinymim_fast.training.checkpoint import kept
    from tinymim_fast.training.resume import changes

    finished = [False] * len(stages)
    for number, stage in enumerate(stages):
        with named(stage.name):
            anew = f"; to train it anew, move {stage.folder} away, and the folders of the stages behind it"
            if changed := changes(stage.config):
                raise InputError(
                    f"{stage.folder} holds a run with another configuration ({'; '.join(changed)}): go back to that, "
                    f"or choose another output_dir{anew}"
                )
            latest = latest_checkpoint(stage.folder)
            if latest is None:
                continue
            teacher = kept(latest).get("teacher_checkpoint", {}).get("sha256")
            if number and finished[number - 1] and teacher not in (None, which_teacher(stage.config)["sha256"]):
                now = f"stage {stages[number - 1].name} is now"
                raise InputError(f"{stage.folder} holds a student of another teacher than {now}{anew}")
            info = describe(latest)
            done = info is not None and info.epoch >= stage.config.epochs and WEIGHTS not in differing(latest)
            finished[number] = done
    return [*finished, False].index(False)


def run_chain(stages: Sequence[Stage], launcher: Sequence[str]) -> None:
    """Train what is not finished, one stage after the other, and report.

    Raises:
        InputError: see `check_fit` and `count_finished`; or the folder can't be used.
        StageFailed: a stage ended with an error.
        Terminated: a signal; what trained has saved.
    """
    from tinymim_fast.chain_report import report
    from tinymim_fast.training.lock import RunLock

    folder = stages[0].folder.parent
    num_finished = count_finished(stages)
    check_fit(stages, num_finished)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = RunLock(folder)
        lock.acquire()
    except OSError as error:
        raise InputError(f"{folder}: can't be written: {error}", argument="output_dir") from error
    try:
        said = Stages(len(stages))
        for number, stage in enumerate(stages):
            said.begin(f"{stage.name}: {stage.config.student_model} in {stage.folder}, log {stage.log}")
            if number < num_finished:
                said.end("finished before")
                continue
            with named(stage.name):
                wait_for_end(stage)
            try:
                launch(said, stage.log, launcher, "train.py", *stage.flags)
            except subprocess.CalledProcessError as error:
                raise StageFailed(stage, error) from error
            except Terminated:
                wait_for_end(stage)  # its ranks may outlive their launcher
                raise
            if count_finished(stages[: number + 1]) <= number:
                raise InputError(f"ended without its last step; see {stage.log}", argument=f"stage {stage.name}")
        try:
            print("\n" + report(folder, {stage.name: stage.config for stage in stages}))
        except OSError as error:
            raise InputError(f"{folder}: the report can't be written: {error}", argument="output_dir") from error
        print(f"The losses of all stages: {folder / 'chain.png'}")
    finally:
        lock.release()


class StageFailed(Exception):
    """A stage's program ended with an error.

    Args:
        stage: whose.
        error: the program's end.
    """

    def __init__(self, stage: Stage, error: subprocess.CalledProcessError):
        super().__init__(stage.name)
        self.stage, self.error = stage, error


def wait_for_end(stage: Stage) -> None:
    """Until nobody trains in the stage's folder: the processes of a chain that was killed save before they end.

    Raises:
        InputError: somebody still does after two minutes.
    """
    from tinymim_fast.training.lock import RunLock

    lock = RunLock(stage.folder, patience_s=ENDING_S)
    lock.acquire()
    lock.release()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, that of the stage that failed where one did."""
    parser = argparse.ArgumentParser(
        prog="python -m tinymim_fast.chain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("chain", metavar="CHAIN", help="a YAML file, or a packaged chain's name")
    parser.add_argument("--output-dir", "--output_dir", help="of the chain; each stage has a folder in it")
    parser.add_argument("--teacher-checkpoint", "--teacher_checkpoint", help="of the first stage, as in train.py")
    parser.add_argument("--launcher", type=shlex.split, metavar="FLAGS", help='of deepspeed: "--num_gpus=8"')
    args, further = parser.parse_known_args(argv)
    given = {key: value for key in (*SET_HERE, "launcher") if (value := getattr(args, key)) is not None}
    logging.basicConfig(format="chain: %(message)s", level=logging.WARNING)
    try:
        with flags(**{key: f"--{key.replace('_', '-')}" for key in (*SET_HERE, "launcher")}):
            stages, launcher = read_chain(args.chain, given, further)
            with terminating():
                run_chain(stages, launcher)
    except InputError as error:
        print(f"\nchain: {error}", file=sys.stderr)
        return EXIT_INPUT
    except Terminated as ended:
        print(f"\nchain: {ended}", file=sys.stderr)
        return EXIT_TERMINATED
    except StageFailed as failed:
        if failed.error.returncode != EXIT_TERMINATED:
            return tell_failure("chain", f"stage {failed.stage.name}", failed.error, failed.stage.log)
        print(f"\nchain: stage {failed.stage.name} stopped and saved; the same command continues", file=sys.stderr)
        return EXIT_TERMINATED
    return 0


@contextmanager
def terminating() -> Iterator[None]:
    """The first of a run's signals raises `Terminated` wherever this process is; the others do nothing."""
    from tinymim_fast.training.stop import SIGNALS

    def stop(signum: int, frame: Any) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        raise Terminated(f"stopped by {signal.Signals(signum).name}, and the stage with it; the same command continues")

    before = {number: signal.signal(number, stop) for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
