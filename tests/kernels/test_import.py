"""The kernels are one module, tinymim_fast.kernels, from an installation and from a checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def run(code: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_a_relative_link_leads_to_the_kernels():
    """A checkout works wherever it lies, without installation."""
    assert os.readlink(ROOT / "tinymim_fast" / "kernels") == os.path.join("..", "kernels")
    done = run("from tinymim_fast.kernels import tiles; print(tiles.__file__)")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).resolve() == ROOT / "kernels" / "tiles.py"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("from kernels import relation_kl", "ImportError: kernels: got the folder itself, want `tinymim_fast.kernels`"),
        ("import kernels; kernels.RelationLoss", "ImportError: kernels: got the folder itself"),
        ("import tinymim_fast, kernels.tiles", "ModuleNotFoundError: No module named 'kernels.tiles'"),
    ],
)
def test_nothing_can_be_taken_from_the_folder_itself(code, message):
    """A second copy would register the ops twice, and its classes would not be the first one's."""
    done = run(code)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(message)


def test_who_looks_for_another_package_of_that_name_is_not_stopped():
    """As transformers does for its own `kernels`."""
    done = run("import kernels; print(getattr(kernels, '__version__', 'N/A'))")
    assert done.stdout.strip() == "N/A", done.stderr
