"""Write output files that are complete or absent."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from latro.errors import named


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path, and move it to `path` when the block ends without an error.

    Readers of `path` see the old content or the new one, never a part: a rename is atomic within
    one file system, which is why the temporary file lies in the same folder.

    Raises:
        OSError: it cannot be written; the error names `path`.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix
        )
        os.close(handle)
        temporary = Path(name)
        yield temporary
        # mkstemp makes files readable by their owner only; output files follow the umask.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None and error.filename not in (None, str(temporary)):
            raise  # The error is about another file, which the block uses.
        raise named(error, path) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def append(path: str | os.PathLike[str], text: str, *, durable: bool = False) -> None:
    """Append `text` to a file; with `durable`, so that it survives a power failure.

    Raises:
        OSError: it cannot be written; the error names the file.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise named(error, path) from error


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, completely or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def finite(value: Any) -> Any:
    """Return a JSON value with null for each number that JSON lacks, as −∞, an impossible log-prob.

    Readers of JSON in other languages refuse such numbers.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(v) for name, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, (list, tuple)) else value


def check_output(
    output: str | os.PathLike[str], *sources: str | None, beside: Sequence[str] = ()
) -> None:
    """Check before any work that a result can be written without overwriting its sources.

    Args:
        output: a JSON file; files beside it have the same name with other suffixes.
        sources: what the result is made from: files, folders, or names of data sets and models.
        beside: the other suffixes.

    Raises:
        ValueError: `output` does not end in .json, is a folder, or cannot be written; or it or a
            file beside it is one of the sources, or lies in one.
    """
    output = Path(output)
    if output.suffix != ".json":
        raise ValueError(f"output: expected a file name that ends in .json, got {str(output)!r}")
    if output.is_dir():
        raise ValueError(f"output: expected a file, got the folder {output}")
    folder = next(p for p in output.absolute().parents if p.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"output: expected a place that can be written to, got {output}")
    for path in (output, *(output.with_suffix(suffix) for suffix in beside)):
        for source in sources:
            if source is None or not (path.exists() and os.path.exists(source)):
                continue
            if path.resolve() == Path(source).resolve():
                raise ValueError(f"output: {path} is the data itself; name another file")
            if Path(source).resolve() in path.resolve().parents:
                raise ValueError(f"output: {path} is a file of {source}; name another file")
