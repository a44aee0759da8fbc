"""How processes of a run find each other: what launchers set, what they leave out, who may connect."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")

from support.programs import PACKAGE, distill_flags, run_forked, start_forked, start_ranks, start_training
from tinymim_fast.distributed import free_port
from tinymim_fast.errors import EXIT_INPUT
from tinymim_fast.models.checkpoints import latest_checkpoint
from tinymim_fast.training.metrics import read_metrics

RENDEZVOUS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
TORCHRUN = Path(sys.executable).parent / "torchrun"
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
    port = free_port()
    elastic = [
        *["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=2", "--rdzv-backend=c10d", "--rdzv-id=run"],
        *[f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-conf=last_call_timeout=10"],
    ]
    flags = distill_flags(image_folder, teacher_file, output_dir, checkpoint_interval=5, **changes)
    log = tmp_path / "log"
    with open(log, "w") as stdout:
        command = (TORCHRUN, *elastic, PACKAGE / "train.py", *flags)
        hosts = [start_training(*command, stdout=stdout)]
        try:
            wait_until(lambda: is_open(port), hosts[0], log)  # the first holds the rendezvous, and stays
            hosts.append(start_training(*command, stdout=stdout))
            wait_until(lambda: latest_checkpoint(output_dir) is not None, hosts[0], log)
            lost = hosts[1]
            for rank in subprocess.run(["pgrep", "-P", str(lost.pid)], capture_output=True, text=True).stdout.split():
                os.killpg(int(rank), signal.SIGKILL)
            lost.kill()
            assert hosts[0].wait(240) == 0, log.read_text()
        finally:
            for host in hosts:
                host.terminate()
    assert "continuing from" in log.read_text(), log.read_text()
    ours, theirs = read_metrics(output_dir), read_metrics(whole)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    assert max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(ours, theirs, strict=True)) < 0.02


def is_open(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def wait_until(condition, process, log, timeout=120):
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
