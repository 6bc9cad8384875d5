"""Report errors from outside, such as a full disk or a damaged file, in one line with the path.

Where such an error is caught, the path that was written or read is added, since most libraries
leave it out; the commands end with that line and exit code 1. An error in the program itself keeps
its traceback.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import signal
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from safetensors import SafetensorError
from torch import distributed

from latro.terminal import Lasting, one_line

# The errors of input and environment: bad values, updates that are not finite, files, disks,
# servers and the hub (`OSError` and subclasses), truncated weights, and packages that are not
# installed.
_FROM_OUTSIDE = (ValueError, FloatingPointError, OSError, SafetensorError, ImportError)

# Where a file cannot be written or read, torch raises exactly RuntimeError, and tokenizers exactly
# Exception. Their subclasses stand for other errors.
_UNTYPED = (RuntimeError, Exception)
_DAMAGE = (
    *(OSError, SafetensorError, json.JSONDecodeError, UnicodeDecodeError, EOFError),
    # An unpickler that reads text pops from an empty stack.
    *(pickle.UnpicklingError, zipfile.BadZipFile, IndexError),
)

# Of torch's exchange between processes on CPUs; it has no error of its own and raises RuntimeError.
_EXCHANGE = "/gloo/"

# The hub's client, and what it has used for connections, release by release; their errors share no
# class.
_OF_THE_HUB = {"huggingface_hub", "httpx", "httpx2", "requests"}


class TrainingInterrupted(Exception):
    """A run ended at signal `number` after `updates` updates, with a checkpoint in `output_dir`."""

    def __init__(self, number: int, updates: int, output_dir: str) -> None:
        super().__init__(
            f"{signal.Signals(number).name}: stopped after update {updates}, with a checkpoint in "
            f"{output_dir}; the same command with --resume_from_checkpoint true goes on from there"
        )
        self.signal = number


class writing:
    """A context manager: errors in writing within it name `path`, a file or a folder.

    Raises:
        OSError: `path` or a file in it could not be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __enter__(self) -> writing:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, OSError):
            raise named(error, self.path) from error
        if isinstance(error, SafetensorError) or (kind in _UNTYPED and not is_lost(error)):
            folder = next(p for p in (self.path, *self.path.absolute().parents) if p.is_dir())
            raise OSError(
                f"{self.path}: cannot be written: {one_line(str(error))}; "
                f"{shutil.disk_usage(folder).free:,} bytes are free on that disk"
            ) from error


@contextlib.contextmanager
def pushing(meanwhile: str) -> Iterator[None]:
    """Report that the hub cannot be reached, or refuses, as one kind of error.

    Args:
        meanwhile: words for what there is nevertheless.

    Raises:
        OSError: the hub's client, or the library beneath it, raised an error of its own.
    """
    try:
        yield
    except Exception as error:
        if not {kind.__module__.partition(".")[0] for kind in type(error).__mro__} & _OF_THE_HUB:
            raise
        reason = one_line(str(error)) or type(error).__name__
        raise OSError(
            f"push_to_hub: the hub cannot be reached, or refuses: {reason}; {meanwhile}"
        ) from error


def named(error: OSError, path: str | os.PathLike[str]) -> OSError:
    """Return the error with a path: its own if that lies in `path`, else `path`.

    Most errors in writing name no file, and a library may name a temporary one.
    """
    if error.strerror is None:
        return OSError(f"{path}: {error}")
    inside = isinstance(error.filename, str) and Path(path) in Path(error.filename).parents
    return OSError(error.errno, error.strerror, error.filename if inside else os.fspath(path))


class reading:
    """A context manager: errors in reading within it name `path` and the argument it came from.

    Raises:
        ValueError: `path` or a file in it is damaged, or cannot be read.
    """

    def __init__(self, argument: str, path: str | os.PathLike[str]) -> None:
        self.argument = argument
        self.path = path

    def __enter__(self) -> reading:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, _DAMAGE) or (kind in _UNTYPED and not is_lost(error)):
            raise ValueError(
                f"{self.argument}: {self.path} cannot be read: {one_line(told(error))}"
            ) from error


def told(error: BaseException | None) -> str:
    """Return an error's message; for a system error, path and reason without the error number."""
    if isinstance(error, OSError) and error.strerror is not None and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error) or type(error).__name__


def is_lost(error: BaseException | None) -> bool:
    """Return whether an error tells that another process of the run ended or does not answer."""
    if isinstance(error, (distributed.DistNetworkError, distributed.DistStoreError)):
        return True
    return type(error) is RuntimeError and _EXCHANGE in str(error)


def exit_with(prog: str, run: Callable[[], object]) -> None:
    """Run a command, and end it at an error from outside with one line instead of a traceback.

    The exit code is 0 for a completed run and 1 for an error. For a run that a signal stopped it is
    128 plus the signal's number (143 for SIGTERM, 130 for SIGINT, 129 for SIGHUP), as in a shell: 0
    would tell a scheduler that there is nothing left to do.
    """
    try:
        run()
        _leave_group()
    except _FROM_OUTSIDE as error:
        sys.exit(one_line(f"{prog}: {told(error)}"))
    except RuntimeError as error:
        if not is_lost(error):
            raise
        # What comes behind is gloo's advice to its developers.
        reason = str(error).partition(" This is typically caused by")[0]
        sys.exit(
            one_line(
                f"{prog}: another process of this run has ended, or does not answer, so this one "
                f"cannot go on; what it printed tells why ({reason})"
            )
        )
    except TrainingInterrupted as interrupted:
        print(one_line(f"{prog}: {interrupted}"), file=Lasting("stderr"))
        _leave_group()
        sys.exit(128 + interrupted.signal)


def _leave_group() -> None:
    """Leave the process group before the exit, where a lost connection would abort the process.

    A group of one has no connection to lose; a colocated vLLM makes one, and leaves it by itself.
    """
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.destroy_process_group()
