import time

import pytest

from tinymim_fast.config import parse
from tinymim_fast.errors import InputError
from tinymim_fast.tasks.distill import DistillConfig
from tinymim_fast.yaml_files import read_mapping

NEEDED = ["--data-path=d", "--output-dir=o", "--teacher-checkpoint=t"]
BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdef", "bcdefg"))


def test_what_is_read(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbfepochs: 20\r\nscale: &s [0.1, 1.0]\r\nratio: *s\r\n")
    assert read_mapping(path) == {"epochs": 20, "scale": [0.1, 1.0], "ratio": [0.1, 1.0]}


BAD = {
    "empty": ("", "is empty, want lines of the form"),
    "a list": ("- a\n- b\n", "holds a list"),
    "one word": ("epochs", "holds one value"),
    "null": ("null", "holds one value"),
    "unclosed": ("epochs: [3", "no YAML in line 1: expected"),
    "tab": ("epochs:\n\t- 3\n", "no YAML in line 2: found character"),
    "twice": ("epochs: 20\nlr: 1\nepochs: 30\n", "line 3: epochs stands here and in line 1"),
    "twice, deeper": ("dali_kwargs:\n  a: 1\n  a: 2\n", "line 3: a stands here and in line 2"),
    "no text as a key": ("3: 4\n", "the key '3' is no text"),
    "aliases that grow": (BOMB, "54 aliases .* want at most 20"),
    "code": (
        "epochs: !!python/object/apply:os.system ['true']\n",
        "no YAML in line 1: could not determine a constructor",
    ),
    "too deep": ("epochs: " + "[" * 600 + "]" * 600, "nested too deep"),
    "too large": ("#" * (1 << 20) + "\nepochs: 3\n", "bytes, want a YAML file of at most"),
    "Latin-1": ("data_path: /tmp/é\n".encode("latin1"), r"not UTF-8 \(byte 16\)"),
    "UTF-16": ("epochs: 20\n".encode("utf16"), r"not UTF-8 \(byte 0\)"),
    "binary": (bytes(range(256)), "not UTF-8"),
    "zeros": (bytes(9), "special characters are not allowed"),
    "unknown key": ("epohcs: 4\n", "has the key epohcs, which no run knows; did you mean epochs"),
    "dashes": ("train-batch-size: 4\n", "did you mean train_batch_size"),
    "a recipe in a recipe": (
        "config: other.yaml\n",
        "config is other.yaml, want a YAML file",
    ),
}


@pytest.mark.fault(
    "a bad value in a YAML recipe, in any encoding", "code 2, one line that names file and line or field"
)
@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_bad_recipes_are_one_line(tmp_path, content, message):
    path = tmp_path / "r.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    began = time.monotonic()
    with pytest.raises(InputError, match=message) as refused:
        parse(DistillConfig, [f"--config={path}", *NEEDED], "p")
    assert str(refused.value).startswith("--config: ") and str(path) in str(refused.value)
    assert "\n" not in str(refused.value) and time.monotonic() - began < 20


@pytest.mark.parametrize(
    "field", ["img_size", "train_batch_size", "mean", "loader", "bf16", "student_model", "dali_kwargs"]
)
def test_no_value_where_there_must_be_one(tmp_path, field):
    (tmp_path / "r.yaml").write_text(f"{field}: null\n")
    with pytest.raises(InputError, match=f"--{field.replace('_', '-')}: got None, want a value"):
        parse(DistillConfig, [f"--config={tmp_path / 'r.yaml'}", *NEEDED], "p")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("img_size: 99999999999999999999", r"--img-size: got 9+, want less than 2 \*\* 31"),
        ("zero_stage: true", "--zero-stage: got True, want a number"),
        ("student_model: ''", "--student-model: got , want no empty text"),
        ("max_image_pixels: 0", "--max-image-pixels: got 0, want more than 0"),
    ],
)
def test_values_that_no_run_can_have(tmp_path, value, message):
    (tmp_path / "r.yaml").write_text(f"{value}\n")
    with pytest.raises(InputError, match=message):
        parse(DistillConfig, [f"--config={tmp_path / 'r.yaml'}", *NEEDED], "p")


def test_a_pipe_is_not_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="no such file"):
        read_mapping(tmp_path / "pipe")
