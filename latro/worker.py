"""A process that answers requests, one line of JSON each, and that may end over one of them.

A chat template or an answer in LaTeX may compute for ever or take all memory, which nothing in the
same process could stop. So it is worked on in a process of its own, whose script sets its limits.
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
    """A worker ended and will not answer; `code` is its exit status, negative for a signal."""

    def __init__(self, code: int, errors: str) -> None:
        told = signal.Signals(-code).name if code < 0 else [str(code), *errors.splitlines()][-1]
        super().__init__(told)
        self.code = code


class Worker:
    """Runs a script that answers each line of its input with a line; requests take turns.

    The process ends with this object. One that was forked from this process needs a worker of its
    own, since both would read the answers.

    Args:
        script: a Python file. It is run isolated, so that no file beside it stands in for a module,
            and is handed this process's sys.path as JSON.
    """

    def __init__(self, script: Path) -> None:
        # It is read when the process has ended. A pipe would fill up unread.
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(script), json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
            # A pool of threads for each core would take all of the address space that is allowed.
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            # A signal to the run's processes is the run's to handle.
            start_new_session=True,
        )
        self.owner = os.getpid()
        self._ended: WorkerEndedError | None = None
        self._lock = threading.Lock()
        weakref.finalize(self, _kill, self._process, self._errors, self.owner)

    def ask(self, request: object) -> Any:
        """Return the answer to a request, both as JSON has them.

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
        return  # forked from the owner, whose worker it is
    process.kill()
    process.communicate()
    errors.close()
