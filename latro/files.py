"""Output files that are whole or not there."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an error.

    Whoever reads `path` sees the old content or the new one, never a part: the rename is atomic
    within one file system, which is why the temporary file lies in the same folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp's files are for their owner alone; an output file follows the umask.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_output(output: str | os.PathLike[str], source: str | os.PathLike[str]) -> None:
    """Check, before any work is done, that a result can be written, and over no data.

    Args:
        output: a JSON file; what goes beside it has its name, with another suffix.
        source: what the result is made from, a file or the name of a data set.

    Raises:
        ValueError: `output` has another suffix than .json, is a folder or lies where no file can be
            written, or is `source`.
    """
    output = Path(output)
    if output.suffix != ".json":
        raise ValueError(f"output: expected a file name that ends in .json, got {str(output)!r}")
    if output.is_dir():
        raise ValueError(f"output: expected a file, got the folder {output}")
    folder = next(p for p in output.absolute().parents if p.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"output: expected a place that can be written to, got {output}")
    if os.path.exists(source) and os.path.realpath(output) == os.path.realpath(source):
        raise ValueError(f"output: {output} is the data itself; name another file")
