"""How processes of a run find each other: what launchers set, what they leave out, who may connect."""

import os
import socket
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")

from support import kills
from support.programs import distill_flags, run_forked, start_forked, start_ranks
from tinymim_fast.distributed import free_port
from tinymim_fast.errors import EXIT_INPUT

RENDEZVOUS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
LISTENING = "0A"  # a socket's state in /proc/net/tcp
LOOPBACK = {"0100007F", "00000000000000000000000001000000"}


def listening_addresses(pid):
    """Local addresses, in hexadecimal, of the TCP sockets on which a process waits for connections."""
    sockets = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            sockets.add(os.readlink(descriptor))
        except OSError:  # closed meanwhile
            continue
    addresses = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_ = fields = line.split()
            if state == LISTENING and f"socket:[{fields[9]}]" in sockets:
                addresses.append(local.split(":")[0])
    return addresses


@pytest.mark.fault("a stranger on the network", "nothing of a run on one machine listens beyond the loopback address")
@pytest.mark.parametrize("ranks", [1, 2])
def test_nothing_listens_beyond_the_loopback_address(image_folder, teacher_file, tmp_path, ranks):
    flags = distill_flags(image_folder, teacher_file, tmp_path / "run", epochs=300)
    runs = [start_forked("train", *flags)] if ranks == 1 else start_ranks("train", *flags, ranks=ranks)
    try:
        runs[0].wait_for("step 2/")
        addresses = [address for run in runs for address in listening_addresses(run.pid)]
        assert addresses, "rank 0 holds the store: if nothing is seen, this test sees nothing"
        assert set(addresses) <= LOOPBACK
    finally:
        for run in runs:
            run.kill()


def test_one_process_a_machine_needs_no_local_rank(image_folder, teacher_file, tmp_path):
    flags = distill_flags(image_folder, teacher_file, tmp_path / "run", epochs=1, warmup_epochs=0)
    launched = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    code, output = run_forked("train", *flags, **launched)
    assert code == 0, output
    assert (tmp_path / "run" / "checkpoints" / "step_00000006").is_dir()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "RANK is set, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT; start with deepspeed or torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "two", **RENDEZVOUS}, "variable WORLD_SIZE: got 'two'"),
        ({"RANK": "2", "WORLD_SIZE": "2", **RENDEZVOUS}, "variable RANK: got 2, want less"),
    ],
    ids=["missing", "no number", "too large"],
)
def test_a_broken_launch_is_one_line_and_writes_nothing(image_folder, teacher_file, tmp_path, environment, message):
    code, output = run_forked("train", *distill_flags(image_folder, teacher_file, tmp_path / "run"), **environment)
    assert code == EXIT_INPUT, output
    assert len(output.splitlines()) == 1 and message in output
    assert not (tmp_path / "run").exists()


def test_a_port_that_is_taken_is_named(image_folder, teacher_file, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        launched = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        code, output = run_forked("train", *distill_flags(image_folder, teacher_file, tmp_path / "run"), **launched)
    assert code == EXIT_INPUT and f"MASTER_PORT {port}: another program listens there" in output, output


@pytest.mark.slow
@pytest.mark.fault(
    "of two hosts (torchrun, a real rendezvous) one is killed", "the other goes on alone from the last checkpoint"
)
def test_of_two_hosts_one_is_lost(image_folder, teacher_file, tmp_path):
    """Two launchers meet at a port, train with two ranks, and one of them is killed with its rank."""
    changes = {"epochs": 10, "drop_path": 0}
    whole, output_dir = tmp_path / "whole", tmp_path / "run"
    code, output = run_forked("train", *distill_flags(image_folder, teacher_file, whole, **changes))
    assert code == 0, output
    flags = distill_flags(image_folder, teacher_file, output_dir, checkpoint_interval=5, **changes)
    kills.lose_a_host(flags, output_dir=output_dir, reference=whole, log=tmp_path / "log")
