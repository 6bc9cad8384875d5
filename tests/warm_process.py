"""Run commands of `latro` in separate processes, without the seconds that imports take.

A process that has imported everything (`python -m tests.warm_process`) forks a child for each
command. The child calls `main` as `python -m` does: it prints through its own file descriptors, an
exit or an error ends it like an interpreter, and signals reach a process of its own. Several
children can form one run, with the variables that torchrun sets. The server itself computes
nothing, since a fork after a parallel region of OpenMP would hang. Pictures of runs are left out;
`test_callbacks.py` tests them.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

ROOT = Path(__file__).parents[1]
COMMANDS = ("latro.train", "latro.sft", "latro.evaluate", "latro.probe")
# Modules that the commands import late.
_ALSO = ("matplotlib.figure", "peft", "transformers.models.llama.modeling_llama")


@dataclass(frozen=True)
class Finished:
    """The result of a command."""

    code: int
    """The exit code; −N if signal N ended the command."""
    stdout: str
    stderr: str


class Running:
    """A command that was started.

    Attributes:
        pid: the id of its process, which leads a session of its own.
    """

    def __init__(self, server: WarmProcess, pid: int, folder: Path) -> None:
        self.pid = pid
        self._server = server
        self._folder = folder
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, or None while the command runs."""
        if self._code is None:
            status = self._server.ask({"poll": self.pid})
            self._code = status if status is None else os.waitstatus_to_exitcode(status)
        return self._code

    def wait(self, timeout: float = 60.0) -> Finished:
        """Return the result; after the timeout, kill the command and all that it started.

        Raises:
            TimeoutError: it took longer; the message has what it printed.
        """
        if self._code is None:
            status = self._server.ask({"wait": self.pid, "seconds": timeout})
            self._code = status if status is None else os.waitstatus_to_exitcode(status)
        texts = [
            (self._folder / name).read_text(encoding="utf-8", errors="replace")
            for name in ("stdout", "stderr")
        ]
        if self._code is None:
            raise TimeoutError(f"killed after {timeout:g} s, having printed {texts}")
        return Finished(self._code, *texts)


def no_picture(history: object, path: Path, panels: object) -> None:
    """Stand in for `draw_progress`, which takes longer than a tiny run."""
    path.write_bytes(b"PNG")


def free_port() -> int:
    """Return the number of a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class WarmProcess:
    """The client's side; as a context manager it starts the process and ends it."""

    def __enter__(self) -> WarmProcess:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm_process"],
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def start(
        self,
        command: str,
        arguments: Sequence[object],
        folder: Path,
        *,
        cwd: Path | None = None,
        stdout: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Running:
        """Start a command.

        Args:
            command: a module with a `main`, usually one of `COMMANDS`, or a script's path.
            arguments: the arguments of the command line.
            folder: the folder to make for its output.
            cwd: the working directory; None: `folder`.
            stdout: the file that its standard output goes to instead, "/dev/full".
            environment: variables to add; libraries have read theirs at import already.
        """
        folder.mkdir(parents=True)
        (folder / "stdout").touch()
        pid = self.ask(
            {
                "command": command,
                "arguments": [str(argument) for argument in arguments],
                "cwd": str(cwd or folder),
                "stdout": stdout or str(folder / "stdout"),
                "stderr": str(folder / "stderr"),
                "environment": {**os.environ, **(environment or {})},
            }
        )
        return Running(self, pid, folder)

    def run_together(
        self,
        command: str,
        arguments: Sequence[object],
        folder: Path,
        *,
        processes: int,
        code: int = 0,
        timeout: float = 240.0,
    ) -> Finished:
        """Run a command in several processes that are one run, and return how they ended.

        They get the variables that `torchrun --standalone` would set.

        Args:
            command: the module or script, as in `start`.
            arguments: the arguments of the command line.
            folder: the folder to make for their output.
            processes: the number of processes.
            code: the exit code that each must have.
            timeout: seconds to wait for each.

        Returns:
            That code and the output of one process after the other.
        """
        # Bind at once, as torchrun does, so that nobody else can take the port.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        started = [
            self.start(
                command,
                arguments,
                folder / str(rank),
                cwd=ROOT,
                environment={
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(processes),
                    "LOCAL_WORLD_SIZE": str(processes),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(store.port),
                    "TORCHELASTIC_USE_AGENT_STORE": "True",
                    "TORCHELASTIC_RESTART_COUNT": "0",
                },
            )
            for rank in range(processes)
        ]
        finished = [process.wait(timeout) for process in started]
        for rank, one in enumerate(finished):
            assert one.code == code, f"process {rank} ended with {one.code}: {one.stderr[-4000:]}"
        stdout = "".join(one.stdout for one in finished)
        return Finished(code, stdout, "".join(one.stderr for one in finished))

    def ask(self, request: Mapping[str, Any]) -> Any:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the warm process ended with code {self._process.wait()}")
        return json.loads(line)


def _serve() -> Callable[[], object] | None:
    """Answer requests until the client ends; return a command in a child, and None at the end."""
    for name in (*COMMANDS, *_ALSO):
        importlib.import_module(name)
    # transformers makes this table at the first load of a model, in 0.2 s.
    mappings = importlib.import_module("transformers.conversion_mapping")
    mappings.get_checkpoint_conversion_mapping("llama")
    importlib.import_module("latro.reporting.callbacks").draw_progress = no_picture
    # At a child's exit, torch would take back each operator that its imports have registered.
    for finalizer in weakref.finalize._registry:
        finalizer.atexit = False
    # A garbage collection would copy all pages that a child shares with this process.
    gc.freeze()
    children: set[int] = set()
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "poll" in request:
            ended, status = os.waitpid(request["poll"], os.WNOHANG)
            children.discard(ended)
            answer = status if ended else None
        elif "wait" in request:
            answer = _status(request["wait"], request["seconds"])
            children.discard(request["wait"])
        else:
            answer = os.fork()
            if answer == 0:
                return _become(request)
            children.add(answer)
        print(json.dumps(answer), flush=True)
    for pid in children:
        os.killpg(pid, signal.SIGKILL)
    return None


def _status(pid: int, seconds: float) -> int | None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.005)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _become(request: Mapping[str, Any]) -> Callable[[], object]:
    """Turn a forked process into a command's, up to the call of `main`."""
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    create = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["stdout"], create),
        (2, request["stderr"], create),
    ):
        opened = os.open(path, flags, 0o666)
        os.dup2(opened, descriptor)
        os.close(opened)
    # A crash in native code then says in its standard error where it was.
    faulthandler.enable()
    command = request["command"]
    sys.argv = [command, *request["arguments"]]
    if command.endswith(".py"):
        return lambda: runpy.run_path(command, run_name="__main__")
    return importlib.import_module(command).main


def _run(main: Callable[[], object]) -> int:
    """Run a command as the interpreter does, and return its exit code.

    The interpreter's last step, tearing down all modules, is left out: it would take ten times as
    long as a command that refuses its input.
    """
    code: object = 0
    try:
        main()
    except SystemExit as exit_:
        code = exit_.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError as error:
        print(f"Exception ignored in: {sys.stdout!r}\n{error!r}", file=sys.stderr)
        code = 120
    return code


if __name__ == "__main__":
    command = _serve()
    os._exit(0 if command is None else _run(command))
