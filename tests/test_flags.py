"""Every flag that a message or a page names exists."""

import ast
import functools
import re
from dataclasses import fields
from pathlib import Path

import pytest

from tinymim_fast.tasks.distill import DistillConfig
from tinymim_fast.tasks.finetune import FinetuneConfig
from tinymim_fast.tasks.pretrain import PretrainConfig

ROOT = Path(__file__).parent.parent
CODE = sorted([*ROOT.glob("tinymim_fast/**/*.py"), *ROOT.glob("kernels/**/*.py")])
OTHER_PROGRAMS = [*ROOT.glob("benchmarks/*.py"), ROOT / "tests" / "soak.py"]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
    *ROOT.glob("**/recipes/**/*.yaml"),
]
# Not `----`, and not the end of a word.
FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9]*(?:[-_][a-z0-9]+)*)")
# Of other programs, which are started in our pages and messages.
OTHERS = {
    "deepspeed": {"num-gpus", "num-nodes", "num-accelerators", "master-port", "master-addr", "hostfile", "module",
                  "include", "node-rank", "no-ssh"},
    "torchrun": {"standalone", "nnodes", "nproc-per-node", "rdzv-backend", "rdzv-endpoint", "rdzv-id", "rdzv-conf",
                 "max-restarts", "node-rank", "master-port", "master-addr"},
    "srun, sbatch": {"nodes", "ntasks-per-node", "signal", "kill-on-bad-exit", "requeue", "gpus-per-node", "open-mode",
                     "cpus-per-task", "time", "ntasks"},
    "pip, git, ruff, python, nvcc tools": {"editable", "upgrade", "quiet", "constraint", "check", "format", "version",
                                           "help", "lazy", "dump-sass", "print-line-info"},
}  # fmt: skip


def strings(path):
    """All text in a Python file's strings, docstrings included, with the gaps of f-strings left out."""
    return "\n".join(
        node.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


@functools.cache
def ours():
    """Flags of all our parsers: fields of configurations, and what functions that add an argument are given."""
    names = {"config", "help"} | {
        f.name for kind in (DistillConfig, PretrainConfig, FinetuneConfig) for f in fields(kind)
    }
    for path in [*CODE, *OTHER_PROGRAMS]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                names |= {
                    arg.value[2:] for arg in node.args if isinstance(arg, ast.Constant) and str(arg.value)[:2] == "--"
                }
    return {name.replace("_", "-") for name in names}


def named(text):
    return {name.replace("_", "-") for name in FLAG.findall(text)}


@pytest.mark.parametrize("path", [*CODE, *PAGES], ids=lambda path: str(path.relative_to(ROOT)))
def test_flags_that_are_named_exist(path):
    text = strings(path) if path.suffix == ".py" else path.read_text()
    unknown = named(text) - ours() - set().union(*OTHERS.values())
    assert not unknown, f"{sorted(unknown)}: no parser of ours has them; the launchers' are listed in this test"


def test_the_launchers_have_theirs():
    runner = pytest.importorskip("deepspeed.launcher.runner")
    torchrun = pytest.importorskip("torch.distributed.run")
    has = {"deepspeed": Path(runner.__file__).read_text(), "torchrun": Path(torchrun.__file__).read_text()}
    for launcher, text in has.items():
        lacking = OTHERS[launcher] - named(text)
        assert not lacking, f"{launcher} has no {sorted(lacking)}"


def test_this_sees_flags():
    assert named("a --not-a-flag and --b_c=3, `--d`, --- and x--y") == {"not-a-flag", "b-c", "d"}
    assert "train-batch-size" in ours() and "not-a-flag" not in ours()
