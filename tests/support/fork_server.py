"""A Python that has imported what the programs import, and forks a process for each run that is asked of it.

A run spends about 5 s on imports (torch, timm, DeepSpeed, what `deepspeed.initialize` imports) before its own first
line. Forked, it is at its first step after about half a second; from `main(argv)` on, everything is what a user's run
does. The processes: tests -> this server -> one keeper a run, which stands where a launcher stands (parent of the run)
-> the run.

Run as `python fork_server.py FD`, FD a socket on which `Server` of this file sends requests; it ends when the socket
closes.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

UNSEEN = -4096  # exit code of a run whose keeper was killed before it: nobody saw it
HERE = Path(__file__).resolve()


class Forked:
    """A run, with as much of `subprocess.Popen`'s interface as tests need.

    Args:
        status: read end of the keeper's pipe: a line with both process ids, later one with the exit code.
        output: read end of the run's standard output and error.
    """

    def __init__(self, status: int, output: int):
        ids = os.read(status, 100).split()
        assert len(ids) == 2, "the fork server ended; its own output, above, says why"
        self.pid, self.launcher_pid = map(int, ids)
        self.returncode: int | None = None
        self._status, self._output = status, output
        self._read = b""
        os.set_blocking(status, False)

    def poll(self) -> int | None:
        """The exit code, negative for signals; None while it runs."""
        if self.returncode is None:
            try:
                line = os.read(self._status, 100)
            except BlockingIOError:
                return None
            if line:
                self.returncode = int(line)
            elif not _alive(self.pid):
                self.returncode = UNSEEN
        return self.returncode

    def wait(self, timeout: float = 120) -> int:
        """The exit code, when it has ended; its output must not fill the pipe (64 KiB) meanwhile."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"run {self.pid}", timeout, self.output)
            time.sleep(0.01)
        return self.returncode

    def wait_for(self, text: str, timeout: float = 180) -> None:
        """Until the output holds `text`; an error where it ends without, or after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while text not in self.output:
            assert self._read_some(deadline), f"never said {text!r}:\n{self.output}"

    def wait_for_silence(self, seconds: float = 3, timeout: float = 180) -> None:
        """Until it has said nothing for so long."""
        deadline = time.monotonic() + timeout
        with contextlib.suppress(subprocess.TimeoutExpired):
            while time.monotonic() < deadline:
                assert self._read_some(time.monotonic() + seconds), f"it ended:\n{self.output}"
            raise AssertionError(f"never silent for {seconds} s")

    def communicate(self, timeout: float = 120) -> tuple[str, None]:
        """All of its output, when it and all that hold its output have ended."""
        deadline = time.monotonic() + timeout
        while self._read_some(deadline):
            pass
        self.wait(max(1.0, deadline - time.monotonic()))
        return self.output, None

    @property
    def output(self) -> str:
        """What was read so far by `wait_for` and `communicate`."""
        return self._read.decode(errors="backslashreplace")

    def kill(self) -> None:
        """SIGKILL to the run and to what it started in its session."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def _read_some(self, deadline: float) -> bool:
        if not select.select([self._output], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise subprocess.TimeoutExpired(f"run {self.pid}", 0, self.output)
        more = os.read(self._output, 1 << 16)
        self._read += more
        return bool(more)

    def __del__(self):
        os.close(self._status)
        os.close(self._output)


class Server:
    """The tests' end. One for a process of tests; `close` at its end."""

    def __init__(self, env: dict[str, str]):
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=env,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def start(self, module: str, argv: list[str], env: dict[str, str], cwd: Path) -> Forked:
        """`python -m MODULE ARGV...`: the module's `main(argv)` in a process and a session of its own."""
        (status, their_status), (output, their_output) = os.pipe(), os.pipe()
        request = json.dumps({"module": module, "argv": argv, "env": env, "cwd": str(cwd)})
        try:
            socket.send_fds(self._socket, [request.encode()], [their_status, their_output])
        finally:
            os.close(their_status)
            os.close(their_output)
        return Forked(status, output)

    def close(self) -> None:
        self._socket.close()
        self._process.wait(30)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def serve(requests: socket.socket) -> dict | None:
    """Fork for each request; returns it in the process that is to run it, and None in the server at its end."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 2)
        if not message:
            return None
        status, output = descriptors
        if os.fork() == 0:
            requests.close()
            if keep(status, output):
                return json.loads(message)
        os.close(status)
        os.close(output)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass


def keep(status: int, output: int) -> bool:
    """True in the run; the keeper reports ids and exit code, and ends."""
    keeper = os.getpid()
    pid = os.fork()
    if pid == 0:
        os.close(status)
        os.setsid()
        for standard in (1, 2):
            os.dup2(output, standard)
        os.close(output)
        return True
    os.close(output)
    os.write(status, f"{pid} {keeper}\n".encode())
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(BrokenPipeError):  # the tests ended
        os.write(status, f"{code}\n".encode())
    os._exit(0)


def main() -> None:
    """Import, serve, and in the forked process be the run."""
    import gc
    import importlib
    import tempfile

    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  deepspeed.initialize imports it: 1 s
    import matplotlib.figure  # noqa: F401

    from tinymim_fast.errors import end_process

    for module in ("train", "pretrain", "finetune", "evaluate", "export", "chain"):
        importlib.import_module(f"tinymim_fast.{module}")
    gc.freeze()
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    if request is None:
        return
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    tempfile.tempdir = None
    sys.argv = [request["module"], *request["argv"]]
    end_process(importlib.import_module(request["module"]).main(request["argv"]))


if __name__ == "__main__":
    main()
