"""Pictures of what students learnt, from runs and checkpoints."""

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("deepspeed")

from support.programs import TEACHER, distill_flags
from support.runs import distil
from tinymim_fast import show as program
from tinymim_fast.errors import EXIT_INPUT
from tinymim_fast.export import export
from tinymim_fast.models.checkpoints import latest_checkpoint


@pytest.fixture(scope="module")
def run(world, image_folder, teacher_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shown") / "mine"
    distil(world, *distill_flags(image_folder, teacher_file, folder, epochs=1))
    return folder


@pytest.fixture
def image(image_folder):
    return next(image_folder.rglob("*.jpg"))


def drawn(monkeypatch, *argv):
    """What the program would draw: the arguments of `draw`."""
    from tinymim_fast import relation_picture

    calls = []
    monkeypatch.setattr(relation_picture, "draw", lambda path, lines, grid, title: calls.append((lines, grid)))
    assert program.main(list(map(str, argv))) == 0
    return calls[0]


def test_a_run_is_drawn_from_its_recipe(run, image, tmp_path, capsys):
    output = tmp_path / "maps.png"
    assert program.main([str(run), str(image), "--output", str(output), "--heads=1,3"]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    with Image.open(output) as picture:
        assert picture.format == "PNG" and np.asarray(picture.convert("L")).std() > 20


def test_students_images_queries_and_heads_are_laid_out_in_order(run, image, tmp_path, monkeypatch):
    export(str(run), tmp_path / "export")
    sources = [run, latest_checkpoint(run), tmp_path / "export", image, image]
    options = [f"--output={tmp_path / 'x.png'}", "--query=1,2", "--query=4,4", "--heads=all", "--relations", "vk"]
    lines, grid = drawn(monkeypatch, *sources, *options)
    assert grid == (4, 4) and len(lines) == 2 * 2 * (1 + 3)
    assert [(line.query, line.head) for line in lines[:8]] == [
        *((1, head) for head in (None, 0, 1, 2)),
        *((15, head) for head in (None, 0, 1, 2)),
    ]
    assert list(lines[0].of.rows) == ["vk"] and list(lines[0].of.rows["vk"]) == [
        "teacher",
        "mine",
        "mine\u2032",
        "export",
    ]
    one, two, three = (lines[0].of.kl["vk"][title] for title in ("mine", "mine\u2032", "export"))
    assert (one == two).all() and (one == three).all() and (one > 0).all()


def test_another_teacher_and_telling_patches(run, image, tmp_path, monkeypatch):
    """The student as its own teacher: no KL."""
    lines, _ = drawn(monkeypatch, run, image, f"--output={tmp_path / 'x.png'}", f"--teacher={run}", "--num-queries=2")
    assert len({line.query for line in lines}) == len(lines) == 2
    assert all(float(kl["mine"].abs().max()) < 1e-6 for kl in lines[0].of.kl.values())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["RUN", "--output=x.png"], "IMAGE: got none, want an image"),
        (["IMAGE", "--output=x.png"], "CHECKPOINT: got none, want a run or checkpoint"),
        (["RUN", "IMAGE", "--output=x.jpg"], "--output: got x.jpg, want a name that ends in .png"),
        (["RUN", "IMAGE", "--output=x.png", "--heads=4"], "--heads: got 4, want 1 to 3"),
        (["RUN", "IMAGE", "--output=x.png", "--heads=a"], "--heads: got a, want numbers with commas between them"),
        (["RUN", "IMAGE", "--output=x.png", "--query=5,1"], "--query: got 5,1, want 1,1 to 4,4"),
        (["RUN", "IMAGE", "--output=x.png", "--query=5"], "--query: got 5, want a row and a column, 3,5"),
        (["RUN", "IMAGE", "--output=x.png", "--relations", "qx"], "--relations: got qx, want two of the letters q, k"),
        (["RUN", "IMAGE", "--output=x.png", "--relation-heads=5"], "--relation-heads: got 5, want a number that "),
        (["RUN", "IMAGE", "--output=x.png", "--target-block=9"], "--target-block: got 9, want 1 to 3, the teacher's"),
        (["RUN", "IMAGE", "--output=x.png", "--num-queries=0"], "--num-queries: got 0, want 1 or more"),
        (["RUN", "none.jpg", "--output=x.png"], "IMAGE: none.jpg: can't be read: "),
        (["none", "IMAGE", "--output=x.png"], "CHECKPOINT: none: no such checkpoint"),
        (["RUN", "IMAGE", "--output=x.png", "--teacher=none"], "--teacher: none: no such checkpoint"),
        (["RUN", "IMAGE", "--output=none/x.png"], "--output: none/x.png: can't be written: "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_one_line(run, image, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    assert program.main([{"RUN": str(run), "IMAGE": str(image)}.get(arg, arg) for arg in argv]) == EXIT_INPUT
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"show: {message}"), line
    assert not list(tmp_path.iterdir())


def test_a_file_that_says_nothing_needs_a_teacher(teacher_file, image, tmp_path, capsys):
    import json

    options = ["--model=vit_tiny_patch16_224", f"--model-kwargs={json.dumps({**TEACHER, 'img_size': 32})}"]
    assert program.main([str(teacher_file), str(image), f"--output={tmp_path / 'x.png'}", *options]) == EXIT_INPUT
    assert "--teacher: got none, and the first checkpoint doesn't say it" in capsys.readouterr().err


def test_titles():
    assert program.title_of("runs/base/") == program.title_of("runs/base/checkpoints/step_00000012") == "base"
    assert program.title_of("mae.pth") == program.title_of("/x/mae.pth") == "mae.pth"
    assert program.title_of("timm:vit_base") == "vit_base"
