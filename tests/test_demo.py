import io
import subprocess

import pytest

pytest.importorskip("deepspeed")

from tinymim_fast import demo, stages
from tinymim_fast.errors import EXIT_INPUT


class Terminal(io.StringIO):
    def isatty(self):
        return True


def said(monkeypatch, stream):
    monkeypatch.setattr(demo.sys, "stdout", stream)
    shown = stages.Stages(5)
    shown.begin("first")
    for step in range(50, 850, 50):
        shown.progress(step, 800, "0.5")
    shown.end("800 steps, loss 0.5")
    shown.begin("second")
    shown.end()
    return stream.getvalue()


def test_a_log_has_a_line_a_quarter(monkeypatch):
    assert said(monkeypatch, io.StringIO()).splitlines() == [
        "[1/5] first",
        *(f"      step {step}/800, loss 0.5" for step in (200, 400, 600, 800)),
        "      800 steps, loss 0.5, 0 s",
        "[2/5] second",
        "      0 s",
    ]


def test_a_terminal_has_one_line_a_stage(monkeypatch):
    lines = said(monkeypatch, Terminal()).split("\n")
    assert "[###.................] step 150/800, loss 0.5" in lines[0]
    assert [line.rpartition("\r\033[K")[2] for line in lines if line] == [
        "[1/5] first: 800 steps, loss 0.5, 0 s",
        "[2/5] second: 0 s",
    ]


def test_progress_is_read_from_a_runs_lines():
    line = "10:51:32 step 50/800  epoch 0.5  loss 0.1754  qk 0.06352  lr 0  images_per_s 184.6\n"
    assert stages.STEP.search(line).groups() == ("50", "800", "0.1754")


def test_a_program_that_fails_shows_the_end_of_its_log_and_keeps_its_code(tmp_path, capsys):
    (tmp_path / "images" / "train").mkdir(parents=True)  # the drawing is skipped, and there is nothing to train on
    assert demo.main([f"--output-dir={tmp_path}"]) == EXIT_INPUT
    out, err = capsys.readouterr()
    assert f"what the programs say to {tmp_path / 'demo.log'}" in out and "pretrain" not in out.split("[2/7]")[0]
    assert f"ended with code {EXIT_INPUT}. The last lines of {tmp_path / 'demo.log'}:" in err
    assert "pretrain.py: --data-path: " in err
    assert len(err.strip().splitlines()) <= stages.SHOWN_ON_FAILURE + 2
    assert "pretrain.py: --data-path: " in (tmp_path / "demo.log").read_text()


def test_a_killed_program_has_a_shells_code(tmp_path, monkeypatch, capsys):
    def killed(*args):
        raise subprocess.CalledProcessError(-9, "train.py")

    monkeypatch.setattr(demo, "launch", killed)
    (tmp_path / "images").mkdir()
    assert demo.main([f"--output-dir={tmp_path}"]) == 128 + 9


def test_a_folder_that_cant_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert demo.main([f"--output-dir={tmp_path / 'file' / 'out'}"]) == EXIT_INPUT
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
