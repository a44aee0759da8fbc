"""The kernels are one module, tinymim_fast.kernels, from an installation and from a checkout."""

import os
import subprocess
import sys
from pathlib import Path

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


def test_the_folder_itself_is_the_same_functions():
    """transformers imports a `kernels` that it finds; a second copy would register the ops twice."""
    done = run("import kernels, tinymim_fast; print(kernels.relation_loss is tinymim_fast.relation_loss)")
    assert done.stdout == "True\n", done.stderr


def test_its_modules_are_refused():
    done = run("import kernels.tiles")
    assert (
        done.stderr.splitlines()[-1]
        == "ModuleNotFoundError: No module named 'kernels.tiles'; 'kernels' is not a package"
    )
