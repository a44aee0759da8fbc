"""Which rank is waited for, and which is gone, without a word from it."""

import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from tinymim_fast.training import peers
from tinymim_fast.training.peers import Peers
from tinymim_fast.training.stop import named


@pytest.fixture
def fast(monkeypatch):
    for name, value in {"BEAT_S": 0.02, "LOOK_AFTER_S": 0.0, "SILENT_S": 1.5}.items():
        monkeypatch.setattr(peers, name, value)


def ranks_of(states, processes=None):
    """A `Peers` for each state, a list of (doing, since), which a test may write into."""
    store, told = dist.HashStore(), [("here", n) for n in processes or [None] * len(states)]
    if processes is None:
        told = [(f"machine {rank}", 1) for rank in range(len(states))]
    for rank in range(len(states)):
        store.set(f"sign_of_life/{rank}", '{"number": 0, "doing": "training", "for_s": 0}')
    found = []
    for rank, state in enumerate(states):
        mine = [(None, told[r][1]) if r == rank else told[r] for r in range(len(states))]

        def gather(value, mine=mine):
            return [(value[0] if place == "here" else place, process) for place, process in mine]

        world = SimpleNamespace(rank=rank, world_size=len(states), store=store, gather=gather)
        found.append(Peers(world, lambda state=state: tuple(state), same="training"))
    return found


def wait_until(condition, timeout=30):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_who_is_waited_for(fast):
    now = time.monotonic()
    states = [["training", now], ["training", now], ["waiting for data", now - 61]]
    first, second, third = ranks_of(states)
    wait_until(lambda: first.late().keys() == {2} == second.late().keys())
    assert named(first.late()).startswith("rank 2 (waiting for data for 6")
    assert third.late() == {}
    states[2][:] = ["training", now]
    wait_until(lambda: first.late() == {})
    third._over.set()  # as a process that is stopped says nothing
    wait_until(lambda: "no sign of life for" in first.late().get(2, ""))
    assert first.late().keys() == {2} and first.silent_s() > 1.5 and first.lost(0.5) == {2: "no sign of life"}


def test_who_ended(fast):
    first, second, third = ranks_of([["training", time.monotonic()] for _ in range(3)])
    second.tell_end("out of memory")
    assert first.lost() == third.lost() == {1: "out of memory"}


def test_a_process_of_this_machine_is_known_to_be_gone(fast):
    first, second = ranks_of([["training", time.monotonic()]] * 2, processes=[2**22 + 1, 2**22 + 2])
    began = time.monotonic()
    assert first.lost() == {1: f"process {2**22 + 2} is gone"} and second.lost().keys() == {0}
    assert time.monotonic() - began < 2


def test_nobody_is_lost_who_gives_signs_of_life(fast):
    first, _ = ranks_of([["training", time.monotonic()]] * 2)
    assert first.lost(1.0) == {} and first.late() == {}
