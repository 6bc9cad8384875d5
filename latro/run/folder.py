"""One folder, one run: decide who may write into an output folder, and what may be overwritten.

While a process trains it holds a lock in the folder; the operating system frees it when the process
ends, however that happens. A new run overwrites nothing that it finds, unless told to
(`--overwrite_output_dir`); a run that resumes from a checkpoint in the folder continues its own
files. The output folder must not be the folder of the model or the data that the run reads.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import shutil
import socket
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from latro.run.checkpoints import PARTIAL, SUPERSEDED

# Files with such a prefix are not pushed to the hub: the lock holds the machine's name.
LOCK_FILE = "_latro.lock"

# The model's files whose names depend on its size.
_WEIGHTS = re.compile(
    r"(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors|(adapter_)?model\.safetensors\.index\.json"
)
_CHECKPOINT = re.compile(rf"({SUPERSEDED})?{PREFIX_CHECKPOINT_DIR}-\d+")
# The errors of file systems without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_logger = logging.getLogger(__name__)


def lock_of(output: str | os.PathLike[str]) -> Path:
    """Return the path of an output file's lock, beside it."""
    return Path(output).with_name(f".{Path(output).stem}{LOCK_FILE}")


@contextmanager
def locked(path: Path, used: str) -> Iterator[None]:
    """Hold the lock file `path` for this process alone, and delete it when the block ends.

    Missing parent folders are made, and removed again if they are still empty.

    Args:
        path: the lock file.
        used: what the lock protects, for messages: "output_dir: runs/latro".

    Raises:
        ValueError: another process holds it.
        OSError: it cannot be made.
    """
    missing = [folder for folder in path.absolute().parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _open_locked(path, used)
    try:
        yield
    finally:
        # Deleted before the lock is released, while no other process can hold this file.
        path.unlink(missing_ok=True)
        os.close(handle)
        for folder in missing:
            if not folder.is_dir() or any(folder.iterdir()):
                break
            folder.rmdir()


def _open_locked(path: Path, used: str) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder of a moment ago may have deleted the file that is open here.
            if not path.exists() or not os.path.samestat(os.fstat(handle), path.stat()):
                os.close(handle)
                continue
            os.truncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        except BlockingIOError as error:
            holder = os.pread(handle, 1000, 0).decode("utf-8", "replace") or "another process"
            os.close(handle)
            raise ValueError(
                f"{used} is in use by {holder}; wait until that ends, or name another"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(handle)
                raise
            _logger.warning(
                "%s: its file system knows no locks; see to it that nothing else uses it", used
            )
        return handle


@contextmanager
def locked_by_all(path: Path, used: str) -> Iterator[None]:
    """Hold a lock as `locked` does, for processes that work together: the main one holds it.

    Raises:
        ValueError: another run's process holds it; raised in all processes.
        OSError: it cannot be made; the other processes raise ValueError.
    """
    with ExitStack() as stack:
        in_main_process(lambda: stack.enter_context(locked(path, used)))
        yield


def in_main_process(act: Callable[[], object]) -> None:
    """Call `act` in the main process, and raise its error in all: none waits for one that ended.

    Raises:
        ValueError: `act` raises it; in the other processes also where it raises an OSError.
        OSError: `act` raises it, in the main process.
    """
    processes = PartialState()
    error: ValueError | OSError | None = None
    if processes.is_main_process:
        try:
            act()
        except (ValueError, OSError) as refused:
            error = refused
    told: list[str | None] = [None if error is None else str(error)]
    if processes.num_processes > 1:
        broadcast_object_list(told)
    if error is not None:
        raise error
    if told[0] is not None:
        raise ValueError(told[0])


def check_apart(
    output_dir: str | os.PathLike[str], sources: Iterable[tuple[str, str | None]]
) -> None:
    """Check that a run's folder neither is nor contains what the run reads.

    Args:
        output_dir: the folder; it need not exist.
        sources: pairs of an argument's name and its value, a path or a name of a model or data set.

    Raises:
        ValueError: it does; the message names the argument.
    """
    # `Path.resolve` would raise RuntimeError at links that lead to each other.
    folder = Path(os.path.realpath(output_dir))
    for argument, value in sources:
        if not value or not os.path.exists(value):
            continue
        source = Path(os.path.realpath(value))
        if folder == source or folder in source.parents:
            raise ValueError(
                f"output_dir: {output_dir} is or holds {argument}'s {value}, which the run reads "
                "and must not write over; name a folder of the run's own"
            )


def to_replace(
    folder: Path, names: Collection[str], *, overwrite: bool | Collection[str]
) -> list[Path]:
    """Return the paths in a new run's folder that the run would overwrite.

    Args:
        folder: the run's folder; it need not exist.
        names: the files that the run writes there besides checkpoints and weights.
        overwrite: whether the run may overwrite them, or the names of those that it may.

    Raises:
        ValueError: there are some that the run may not overwrite.
    """
    if not folder.is_dir():
        return []
    found = [
        path
        for path in sorted(folder.iterdir())
        if path.name in (*names, PARTIAL)
        or _WEIGHTS.fullmatch(path.name)
        or _CHECKPOINT.fullmatch(path.name)
    ]
    if overwrite is True:
        return found
    if kept := [path.name for path in found if path.name not in (overwrite or ())]:
        listed = ", ".join(kept[:5]) + (", …" if kept[5:] else "")
        raise ValueError(
            f"output_dir: {folder} has {listed} already, which this run would write over; name "
            "another folder, go on with a run of before by --resume_from_checkpoint true, or "
            "delete what is there by --overwrite_output_dir true"
        )
    return found


def delete(paths: Iterable[Path]) -> None:
    """Delete files, folders with their contents, and links without their targets."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
