"""Chains of students: what is refused before the first starts, and one that is stopped, killed and finished."""

import itertools
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import safetensors
import yaml
from safetensors.torch import load_file, save_file

pytest.importorskip("deepspeed")

from support.kills import assert_same_run
from support.programs import ROOT, TEACHER, TINY, distill_flags, start_forked
from support.runs import distil, last_step
from tinymim_fast import chain
from tinymim_fast.chain_report import markdown, row
from tinymim_fast.config import parse
from tinymim_fast.distributed import free_port
from tinymim_fast.errors import EXIT_INPUT, EXIT_TERMINATED
from tinymim_fast.files import write_checksums
from tinymim_fast.models.checkpoints import WEIGHTS, latest_checkpoint
from tinymim_fast.tasks.distill import DistillConfig
from tinymim_fast.training import lock

STAGES = {
    "first": {
        "teacher_model": "vit_tiny_patch16_224",
        "teacher_model_kwargs": TEACHER,
        "student_model_kwargs": TINY,
    },
    "second": {"student_model_kwargs": {**TINY, "embed_dim": 24}, "seed": 3},
}
OF_A_STAGE = {"teacher_model": None, "teacher_model_kwargs": None, "student_model_kwargs": None}


def write_chain(folder, second=None, **keys):
    path = folder / "chain.yaml"
    stages = {**STAGES, "second": {**STAGES["second"], **(second or {})}}
    path.write_text(yaml.safe_dump({"stages": stages, **keys}, sort_keys=False))
    return str(path)


@pytest.fixture
def argv(image_folder, teacher_file, tmp_path):
    """What is given for all stages."""

    def flags(**changes):
        return distill_flags(image_folder, teacher_file, tmp_path / "out", **{**OF_A_STAGE, **changes})

    return flags


@pytest.mark.fault("a chain whose stages don't fit each other", "refused before the first starts, with stage and key")
@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"epoch": 3}, "stage second: {chain} has the key epoch, which no run knows; did you mean epochs?"),
        ({"epochs": 0}, "stage second: epochs: got 0, want more than 0"),
        ({"output_dir": "x"}, "stage second: output_dir: got x, but the chain sets it; leave it out here"),
        ({"config": "tinymim_huge"}, "stage second: config: got tinymim_huge, want a YAML file or one of the recipes"),
        (
            {"student_model_kwargs": {**TINY, "embed_dim": 40, "num_heads": 4}},
            "stage second: relation_heads: got 3, want a number that divides the student's width 40",
        ),
        ({"student_model_kwargs": {**TINY, "img_size": 64}}, "stage second: student_model_kwargs: the student has 65"),
        ({"target_block": 4}, "stage second: target_block: got 4, want 1 to 3, the number of the teacher's blocks"),
        (
            {"teacher_model": "vit_base_patch16_224"},
            "stage second: teacher_model: got vit_base_patch16_224, but stage first trains a vit_tiny_patch16_224",
        ),
        ({"teacher_model_kwargs": {"num_heads": 6}}, "stage second: teacher_model_kwargs: block 1 has 6 heads in the "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_stages_that_dont_fit_are_refused_before_anything_is_written(argv, tmp_path, capsys, second, message):
    path = write_chain(tmp_path, second)
    ours = {key: None for key in second if key != "output_dir"}  # flags for all stages would win
    assert chain.main([path, *argv(**ours)]) == EXIT_INPUT
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("chain: " + message.format(chain=path)), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("keys", "changes", "message"),
    [
        ({"stage": {}}, {}, "CHAIN: {chain} has the key stage, which no run knows; did you mean stages?"),
        ({"stages": ["first"]}, {}, "stages: {chain}: want names with keys of a run each"),
        ({"stages": {"a/b": {}}}, {}, "stage a/b: stages: want a name of letters, digits, - and _"),
        ({"launcher": "--num_gpus=8"}, {}, "--launcher: got --num_gpus=8, want a list of flags of deepspeed"),
        ({}, {"output_dir": None}, "--output-dir: got None, want a path, in {chain} or as a flag"),
        ({}, {"teacher_checkpoint": "/none.pth"}, "stage first: teacher_checkpoint: /none.pth: no such checkpoint"),
        ({}, {"epochs": "x"}, "stage first: "),
    ],
    ids=["key", "list", "name", "launcher", "folder", "teacher", "flag"],
)
def test_bad_chains_are_one_line(argv, tmp_path, capsys, keys, changes, message):
    path = write_chain(tmp_path, **keys)
    missing = [f"--{key.replace('_', '-')}=" for key, value in changes.items() if value is None]
    changes = {key: value for key, value in changes.items() if value is not None}
    flags = [flag for flag in argv(**changes) if not (missing and flag.startswith(missing[0]))]
    assert chain.main([path, *flags]) == EXIT_INPUT
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("chain: " + message.format(chain=path)), line
    assert not (tmp_path / "out").exists()


def test_packaged_chains_are_whole(tmp_path, image_folder):
    """The paper's goes L -> B -> S -> T: what each student offers is what the next one asks for."""
    given = {"output_dir": str(tmp_path / "out"), "teacher_checkpoint": "mae.pth"}
    for path in sorted(chain.CHAINS.glob("*.yaml")):
        stages, _ = chain.read_chain(path.stem, given, [f"--data-path={image_folder}"])
        assert stages[0].config.teacher_checkpoint == "mae.pth"
        for before, stage in itertools.pairwise(stages):
            assert stage.config.teacher_checkpoint == before.config.output_dir == str(tmp_path / "out" / before.name)
            chain.check_fit([before, stage], num_finished=1)
    sizes = [stage.config.student_model for stage in chain.read_chain("tinymim_chain", given, ["--data-path=x"])[0]]
    assert sizes == [f"vit_{size}_patch16_224" for size in ("base", "small", "tiny")]


def test_flags_win_over_a_stage_and_a_stage_over_the_chain(argv, tmp_path):
    path = write_chain(tmp_path, {"lr": 0.5, "warmup_epochs": 0.5}, lr=0.25, warmup_epochs=0.25, seed=7)
    given = {"output_dir": "out", "teacher_checkpoint": "t"}
    stages, _ = chain.read_chain(path, given, ["--data-path=x", "--warmup-epochs=0"])
    assert [(s.config.lr, s.config.warmup_epochs, s.config.seed) for s in stages] == [(0.25, 0, 7), (0.5, 0, 3)]


def wait_for_step(run, folder, step):
    deadline = time.monotonic() + 180
    while last_step(folder) < step:
        assert run.poll() is None and time.monotonic() < deadline, run.communicate(60)[0]
        time.sleep(0.02)


@pytest.mark.fault(
    "SIGTERM to a chain of runs", "the run that trains saves, code 75; the same command goes on inside it"
)
@pytest.mark.fault(
    "SIGKILL to a chain of runs", "the run that trains saves and ends; the same command goes on inside it"
)
@pytest.mark.fault("a finished stage of a chain is found changed", "refused with what differs and the way out")
def test_a_chain_is_stopped_killed_and_finished(world, argv, tmp_path, image_folder, teacher_file, capsys, monkeypatch):
    changes = {"epochs": 20, "checkpoint_interval": 10, "checkpoint_minutes": 0, "drop_path": 0.1}
    out, flags = tmp_path / "out", argv(**changes)
    port = f"--launcher=--num_accelerators=1 --master_port={free_port()}"
    path = write_chain(tmp_path)
    run = start_forked("chain", path, port, *flags)
    try:
        wait_for_step(run, out / "first", 10)
        monkeypatch.setattr(lock, "PATIENCE_S", 0.1)
        assert chain.main([path, port, *flags]) == EXIT_INPUT
        assert (
            f"another run is training here (host {os.uname().nodename}, process {run.pid})" in capsys.readouterr().err
        )
        os.kill(run.pid, signal.SIGTERM)
        output, _ = run.communicate(120)
    finally:
        run.kill()
    assert run.returncode == EXIT_TERMINATED and "chain: stopped by SIGTERM, and the stage with it" in output, output
    stopped_at = last_step(out / "first")
    assert 10 <= stopped_at < 120 and not (out / "second").exists()
    assert f"stopped by SIGTERM at step {stopped_at}, saved" in (out / "first.log").read_text()

    run = start_forked("chain", path, port, *flags)
    try:
        wait_for_step(run, out / "second", 10)
        os.kill(run.pid, signal.SIGKILL)
        again = start_forked("chain", path, port, *flags)  # at once: what the other left is still saving
        try:
            output, _ = again.communicate(180)
        finally:
            again.kill()
    finally:
        run.kill()
    assert again.returncode == 0, output + (out / "second.log").read_text()
    assert "[1/2] first: vit_tiny_patch16_224" in output and "finished before" in output, output
    assert "stopped by the end of its launcher" in (out / "second.log").read_text()

    teacher = teacher_file
    for name, keys in STAGES.items():  # the same by hand
        whole = tmp_path / "whole" / name
        keys = {key: json.dumps(value) for key, value in keys.items()}
        keys |= {"teacher_model": STAGES[name].get("teacher_model")}
        distil(world, *distill_flags(image_folder, teacher, whole, **{**OF_A_STAGE, **changes, **keys}))
        assert_same_run(out / name, whole)
        teacher = whole

    first, second = json.loads((out / "chain.json").read_text())
    assert (first["stage"], second["stage"], second["teacher"], second["steps"]) == ("first", "second", "first", 120)
    assert second["last_loss"] < second["first_loss"]
    assert (first["width"], second["width"]) == (TINY["embed_dim"], 24)
    assert (out / "chain.md").read_text() in output and (out / "chain.png").stat().st_size > 5000

    logs = [(out / f"{name}.log").read_text() for name in STAGES]
    assert chain.main([path, port, *flags]) == 0
    assert capsys.readouterr().out.count("finished before") == 2
    assert logs == [(out / f"{name}.log").read_text() for name in STAGES], "a finished stage was run again"

    assert chain.main([path, port, *argv(**{**changes, "epochs": 21})]) == EXIT_INPUT
    said = capsys.readouterr().err
    assert f"stage first: {out / 'first'} holds a run with another configuration (epochs: 20 -> 21): go back" in said
    assert f"move {out / 'first'} away" in said

    weights = latest_checkpoint(out / "first") / WEIGHTS  # as another training would leave them
    with safetensors.safe_open(weights, framework="pt") as file:
        metadata = file.metadata()
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights, metadata)
    write_checksums(weights.parent)
    assert chain.main([path, port, *flags]) == EXIT_INPUT
    assert (
        "stage second: " in (said := capsys.readouterr().err) and "student of another teacher than stage first" in said
    )


@pytest.mark.fault("a stage of a chain fails", "the chain ends with its exit code and the end of its log")
def test_a_failing_stage_stops_the_chain_with_its_code_and_log(argv, tmp_path, capsys):
    flags = argv(data_path=tmp_path / "no images")
    port = f"--launcher=--num_accelerators=1 --master_port={free_port()}"
    assert chain.main([write_chain(tmp_path), port, *flags]) == EXIT_INPUT
    err = capsys.readouterr().err
    assert (
        f"chain: stage first ended with code {EXIT_INPUT}. The last lines of {tmp_path / 'out' / 'first.log'}:" in err
    )
    assert "train.py: --data-path: " in err
    assert not (tmp_path / "out" / "second.log").exists()


def test_a_stages_row_is_worked_out_from_its_records(tmp_path, argv):
    """Two records of 10 steps of 16 images, at 100 and 50 images a second: 1.6 s and 3.2 s."""
    config = parse(DistillConfig, [*argv(), "--student-model-kwargs={}"], "p")
    records = [{"step": 10, "loss": 4.0, "images_per_s": 100.0}, {"step": 20, "loss": 1.0, "images_per_s": 50.0}]
    found = row("tiny", config, [*records[:1], {"step": 15}, *records[1:]])
    assert found["hours"] * 3600 == pytest.approx(1.6 + 3.2)
    assert (found["first_loss"], found["last_loss"], found["steps"], found["images_per_s"]) == (4.0, 1.0, 20, 75.0)
    title, dashes, line = markdown([found]).splitlines()
    assert title.startswith("| stage | teacher ") and set(dashes) == {"|", "-", " "}
    assert [cell.strip() for cell in line.split("|")][1:-1] == [
        *("tiny", Path(config.teacher_checkpoint).name, "vit_tiny_patch16_224", "–", "3", "20", "4", "1", "75", "0.00"),
    ]
    assert "| –  " in markdown([row("tiny", config, [])])


def test_the_chain_of_the_readme_is_one(tmp_path):
    section = (ROOT / "README.md").read_text().split("## Chains", 1)[1]
    (tmp_path / "mine.yaml").write_text(re.search(r"```yaml\n(.*?)```", section, re.DOTALL)[1])
    stages, launcher = chain.read_chain(str(tmp_path / "mine.yaml"), {"output_dir": str(tmp_path / "out")}, [])
    assert launcher == ["--num_gpus=8"] and [stage.config.epochs for stage in stages] == [300, 100]
    assert stages[0].config.teacher_checkpoint.startswith("timm:")
    chain.check_fit(stages, num_finished=1)
