import subprocess
import sys

import pytest

from support.programs import ROOT

ENDS = """
import atexit
from tinymim_fast.errors import end_process

class Held:
    def __del__(self):
        print("taken apart")

held = Held()
atexit.register(print, "hook")
print("said", end=", ")
end_process(7)
"""


def test_a_process_ends_after_its_hooks_and_is_not_taken_apart():
    done = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (7, "said, hook\n", "")


def test_world_of_one(world):
    assert (world.rank, world.world_size, world.is_main) == (0, 1, True)
    assert world.broadcast(lambda: 3) == 3 and world.gather("x") == ["x"]
    with pytest.raises(KeyError, match="gone"):
        world.broadcast(lambda: {}["gone"])
    work, answer = world.start_max(2)
    work.wait()
    assert int(answer) == 2
