"""The study on drawn images, tiny: its stages, its plan, its table; what it finds here means nothing."""

import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace

import pytest

pytest.importorskip("deepspeed")

import study
import study_report
from study_plan import TEACHER_SHARE, Plan, make_plan
from study_rows import Sizes, chosen, distil_flags, finetune_flags, pretrain_flags, rows
from support.programs import ROOT, TINY, run_forked
from tinymim_fast.config import parse
from tinymim_fast.errors import EXIT_INPUT, EXIT_TERMINATED, InputError
from tinymim_fast.tasks.distill import DistillConfig
from tinymim_fast.tasks.finetune import FinetuneConfig
from tinymim_fast.tasks.pretrain import PretrainConfig

SIZES = Sizes(
    teacher={**TINY, "embed_dim": 96},
    student=TINY,
    assistant={**TINY, "embed_dim": 72},
    target_block=2,
    decoder={"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2},
    batch_size=16,
)
PLAN = Plan(
    hours=1.0,
    seeds=(1,),
    rows=("scratch", "relations"),
    num_images=96,
    bf16=False,
    images_per_s={},
    teacher_epochs=1,
    pretrain_epochs=1,
    finetune_epochs=1,
    estimates_s={},
)


def forked(command, log):
    """A program of the study from a Python that has imported everything."""
    program, *flags = command
    code, output = run_forked(program.removesuffix(".py"), *flags)
    log.write(output)
    commands.append((program, {flag.split("=")[0]: flag.split("=", 1)[1] for flag in flags}))
    return code


commands: list[tuple[str, dict[str, str]]] = []


@pytest.fixture
def arguments(image_folder, tmp_path):
    commands.clear()
    (tmp_path / "out").mkdir()
    PLAN.save(tmp_path / "out" / "plan.json")
    results = tmp_path / "results"
    return [
        *(f"--data-path={image_folder}", f"--output-dir={tmp_path / 'out'}", f"--results={results}"),
        *("--rows", "scratch", "relations"),
    ], results


def test_it_stops_goes_on_and_begins_nothing_twice(arguments):
    argv, results = arguments
    assert study.main([*argv, "--max-time=0.5"], sizes=SIZES, run=forked) == EXIT_TERMINATED, "less than a stage needs"
    assert not commands and not results.exists()
    assert study.main(argv, sizes=SIZES, run=forked) == 0
    assert [program for program, _ in commands] == ["pretrain.py", "finetune.py", "train.py", "finetune.py"]
    lines = study_report.read(results / "study.csv")
    assert [(line["row"], line["seed"]) for line in lines] == [("teacher", "0"), ("scratch", "1"), ("relations", "1")]
    assert all(line["top1"] for line in lines[1:]) and lines[1]["knn"] == "" and lines[2]["knn"] and lines[2]["linear"]
    assert all(line["num_images"] == "32" for line in lines), "the validation images"
    assert (results / "study.png").stat().st_size > 1000
    done = len(commands)
    assert study.main(argv, sizes=SIZES, run=forked) == 0
    assert len(commands) == done, "what is done is not begun again"
    (of_scratch,) = [f for p, f in commands[:done] if f["--output-dir"].endswith("scratch_finetuned_seed1")]
    (of_relations,) = [f for p, f in commands[:done] if f["--output-dir"].endswith("relations_finetuned_seed1")]
    differ = {
        name for name in of_scratch.keys() | of_relations.keys() if of_scratch.get(name) != of_relations.get(name)
    }
    assert differ == {"--checkpoint", "--model", "--model-kwargs", "--output-dir"}, "fine-tuning is the same for all"
    assert of_scratch["--checkpoint"] == "none" and of_relations["--checkpoint"].endswith("relations_seed1")


PROGRAM = """
import pathlib, signal, sys, time
def save(*_):
    pathlib.Path(sys.argv[1]).write_text("saved")
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
"""
START = (
    "import sys; import study; study.PACKAGE = study.Path(sys.argv[1]); study.start_program(sys.argv[2:], sys.stdout)"
)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_program_saves_when_the_study_is_killed(number, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])}
    command = [sys.executable, "-c", START, str(tmp_path), "program.py", str(tmp_path / "saved")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    try:
        while "ready" not in (line := process.stdout.readline()):
            assert line, "it ended"
        process.send_signal(number)
        process.wait(30)
        deadline = time.monotonic() + 30
        while not (tmp_path / "saved").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (tmp_path / "saved").exists()
    finally:
        process.kill()


def test_a_program_that_fails_is_named(arguments, capsys):
    argv, _ = arguments
    assert study.main(argv, sizes=SIZES, run=lambda command, log: 2) == 1
    assert "study: pretrain.py ended with code 2" in capsys.readouterr().err


@pytest.mark.parametrize("row", rows(Sizes()), ids=lambda row: row.name)
def test_every_flag_is_the_programs(row):
    """As the study gives them; a row whose flags this version lacks is left out and says so."""
    if row.missing:
        assert row not in list(chosen(Sizes(), None))
        pytest.skip(f"train.py has no {', '.join(row.missing)} yet")
    paths = [study._flag("data_path", "x"), study._flag("output_dir", "x")]
    tune = parse(FinetuneConfig, [*paths, *_flags(finetune_flags(Sizes(), row)), "--checkpoint=none"], "p")
    assert tune.val_interval == 0 and tune.train_batch_size == 64
    if row.program == "train.py":
        config = parse(DistillConfig, [*paths, *_flags(distil_flags(Sizes(), row)), "--teacher-checkpoint=x"], "p")
        assert config.student_model_kwargs == getattr(Sizes(), row.student)
    elif row.program:
        config = parse(PretrainConfig, [*paths, *_flags(pretrain_flags(Sizes(), row.student))], "p")
        assert config.model_kwargs == Sizes().student


def _flags(given):
    return [study._flag(name, value) for name, value in given.items()]


def test_a_row_comes_with_its_teacher():
    names = [row.name for row in chosen(Sizes(), ["sequential"])]
    assert names == ["assistant", "sequential"]


def rates(stage, bf16):
    return {"teacher": 900.0, "finetune": 800.0}.get(stage, 400.0) * (0.5 if bf16 else 1.0)


def plan(hours, measure=rates, num_images=50_000):
    asked = []

    def watched(stage, bf16):
        asked.append((stage, bf16))
        return measure(stage, bf16)

    made = make_plan(list(chosen(Sizes(), None)), Sizes(), watched, hours=hours, seeds=(0, 1, 2), num_images=num_images)
    return made, asked


def test_the_plan_fits_the_hours():
    for hours in (6.0, 12.0, 40.0):
        made, _ = plan(hours)
        used = sum(made.estimates_s.values()) / 3600
        assert 0.6 * hours < used <= hours and made.estimates_s["teacher"] <= TEACHER_SHARE * 3600 * hours
        assert made.finetune_epochs - made.pretrain_epochs in (0, 1)
    assert plan(40.0)[0].pretrain_epochs > plan(12.0)[0].pretrain_epochs >= 1
    assert "does not fit" in plan(0.5)[0].describe() and "does not fit" not in plan(12.0)[0].describe()
    assert "all" in plan(12.0)[0].describe() and "fp32" in plan(12.0)[0].describe()


def test_the_faster_precision_is_taken_and_the_rest_measured_in_it():
    made, asked = plan(12.0)
    assert not made.bf16 and [stage for stage, bf16 in asked if bf16] == ["teacher", "finetune", "relations"]
    assert len(set(asked)) == len(asked) and ("drop_path_0", False) not in asked, "it costs what relations do"
    made, asked = plan(12.0, lambda stage, bf16: rates(stage, not bf16))
    assert made.bf16 and all(bf16 for _, bf16 in asked[6:])


def test_a_plan_is_kept(tmp_path):
    made, _ = plan(12.0)
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made


def test_intervals_are_students():
    mean, half = study_report.interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.303 / math.sqrt(3))
    assert math.isnan(study_report.interval([5.0])[1])


def line(row, seed, top1, group="methods", **more):
    of_all = {"title": row, "paper": "", "linear": "", "knn": "", "num_images": "5000", "epochs": "1"}
    ran = {"batch_size": "64", "minutes": "30.0", "precision": "fp32", "device": "a CPU", "torch": "2", "commit": "abc"}
    return {"row": row, "group": group, "seed": seed, "top1": top1, **of_all, **ran, "date": "2026-01-01", **more}


def test_the_table_has_means_intervals_and_the_papers_numbers(tmp_path):
    lines = [
        line("scratch", "0", "50.0", paper="T 72.2"),
        line("masked", "0", "61.0", group="relations"),
        line("scratch", "1", "52.0", paper="T 72.2"),
        line("teacher", "0", "", group="teacher", knn="40.0"),
    ]
    text = study_report.table(lines).splitlines()
    assert text[2:] == [
        "| teacher |  |  | 40.0 |  |",
        "| scratch | 51.0 ± 12.7 |  |  | T 72.2 |",
        "| *relations QK + VV, but* |  |  |  |  |",
        "| masked | 61.0 |  |  |  |",
    ]
    assert study_report.section(tmp_path) == "Not run yet."


def test_held_out_images_are_none_that_are_trained_on(image_folder, tmp_path):
    data = study.prepare_images(image_folder, tmp_path, held_out=True)
    trained, validated = ({p.resolve() for p in (data / split).rglob("*.jpg")} for split in ("train", "val"))
    assert not trained & validated and trained | validated == {
        p.resolve() for p in (image_folder / "train").rglob("*") if p.is_file()
    }
    assert len(validated) == 16, "one of six in each of 16 classes"
    few = study.prepare_images(image_folder, tmp_path / "few", held_out=False, per_class=2)
    assert len(list((few / "train").rglob("*.jpg"))) == 32 == len(list((few / "val").rglob("*.jpg")))


def test_an_archive_is_unpacked_once(image_folder, tmp_path):
    archive = tmp_path / "set.tar.xz"
    with tarfile.open(archive, "w:xz") as file:
        for split in ("train", "val"):
            file.add(image_folder / split, arcname=split)
    folder = study.unpack(archive, tmp_path / "out")
    assert sorted(p.name for p in folder.iterdir()) == ["train", "val"]
    archive.unlink()
    assert study.unpack(archive, tmp_path / "out") == folder
    with pytest.raises(InputError, match="no folder, and can't be unpacked"):
        study.unpack(archive, tmp_path / "other")


def test_another_plans_folder_is_refused(arguments, capsys):
    argv, _ = arguments
    assert study.main([*argv, "mae"], sizes=SIZES, run=forked) == EXIT_INPUT
    assert "was made for other rows" in capsys.readouterr().err


@pytest.mark.slow
def test_all_rows_run(arguments, tmp_path):
    argv, results = arguments
    ran = list(chosen(Sizes(), None))
    everything = replace(PLAN, seeds=(0,), rows=tuple(row.name for row in ran))
    everything.save(tmp_path / "out" / "plan.json")
    assert study.main(argv[:3], sizes=SIZES, run=forked) == 0
    lines = study_report.read(results / "study.csv")
    assert {line["row"] for line in lines} == {"teacher", *(row.name for row in ran if row.compared)}
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["seeds"] == [0]
