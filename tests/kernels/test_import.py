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


@pytest.mark.parametrize("code", ["import kernels", "import kernels.tiles", "import tinymim_fast, kernels"])
def test_the_folder_itself_is_refused(code):
    """A second copy would register the ops twice, and its classes would not be the first one's."""
    done = run(code)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "ImportError: kernels: got the folder itself, want `import tinymim_fast"
    )
