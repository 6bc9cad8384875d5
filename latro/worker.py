"""A process that answers requests, one line of JSON each, and may end while working on one.

A chat template or an answer in LaTeX may compute for ever or take all memory, and nothing in the
same process could stop it. So it is handled in a separate process, whose script sets its own
limits.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from pathlib import Path
from typing import IO, Any


class WorkerEndedError(Exception):
    """A worker ended before it answered; `code` is its exit status, negative for a signal."""

    def __init__(self, code: int, errors: str) -> None:
        told = signal.Signals(-code).name if code < 0 else [str(code), *errors.splitlines()][-1]
        super().__init__(told)
        self.code = code


class Worker:
    """Runs a script that answers each input line with one line; requests take turns.

    The process ends with this object. After a fork the child needs a worker of its own, since both
    would read the answers.

    Args:
        script: a Python file. It runs isolated, so that no file beside it shadows a module, and
            gets this process's sys.path as a JSON argument.
    """

    def __init__(self, script: Path) -> None:
        # A file, read after the process has ended: a pipe would fill up unread.
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(script), json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
            # A thread pool with a thread per core would exceed the limit on address space.
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            # Signals to the run's process group are for the run to handle.
            start_new_session=True,
        )
        self.owner = os.getpid()
        self._ended: WorkerEndedError | None = None
        self._lock = threading.Lock()
        weakref.finalize(self, _kill, self._process, self._errors, self.owner)

    def ask(self, request: object) -> Any:
        """Return the answer to a request; both are JSON values.

        Raises:
            WorkerEndedError: the process ended before it answered.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            if self._ended is not None:
                raise self._ended
            try:
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
                line = self._process.stdout.readline()
            except BrokenPipeError:
                line = ""
            if line:
                return json.loads(line)
            code = self._process.wait()
            self._errors.seek(0)
            self._ended = WorkerEndedError(code, self._errors.read())
            raise self._ended


def _kill(process: subprocess.Popen[str], errors: IO[str], owner: int) -> None:
    if os.getpid() != owner:
        return  # this process is a fork, and the worker belongs to its parent
    process.kill()
    process.communicate()
    errors.close()
