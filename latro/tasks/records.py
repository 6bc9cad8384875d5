"""Read files of records, each with its place in the file for error messages.

A place is "file:line", the line where the record begins. A Parquet file has no lines, so there it
is "file: row 3", counted from 0 as in pandas and `datasets`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

Records = Iterable[tuple[str, dict[str, Any]]]

# In characters. The module's own, of 131,072, is less than a prompt may have.
_LARGEST_CELL = 2**31 - 1


def _number(text: str) -> float | Decimal:
    """Return a number of JSON with the digits that it is written in: 3.10 is a price, 3.1 is none.

    With an exponent it is a float, since 1e-999999999 would be written out in so many digits.
    """
    return float(text) if "e" in text.lower() else Decimal(text)


_JSON = json.JSONDecoder(parse_float=_number)


def read_records(path: Path) -> Records:
    """Yield (place, record) for each record of a file, in the format that its name ends in.

    Raises:
        ValueError: the format is not one of `FORMATS`, or the file is malformed; the message names
            the place.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: expected a file in {', '.join(FORMATS)}, got {path.suffix!r}")
    yield from FORMATS[path.suffix.lower()](path)


@contextmanager
def _in_utf8(path: Path) -> Iterator[None]:
    """Raise ValueError with the file's name where its bytes are not UTF-8."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8: {error}") from error


def read_jsonl(path: Path) -> Records:
    """Yield (place, record) for each line of a JSON-lines file that is not blank.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not a JSON object, or the file is not UTF-8; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"dataset_path: there is no file {path}")
    # A byte-order mark, as some editors write, is no part of the first line.
    with _in_utf8(path), path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = _JSON.decode(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON: {error.msg}, column {error.colno}") from error
            except (ValueError, RecursionError) as error:  # more digits or brackets than are read
                raise ValueError(f"{where}: {error}") from error
            yield where, _object(record, where)


def _read_json(path: Path) -> Records:
    """Yield the records of a JSON list of objects, or of one object per line."""
    with _in_utf8(path):
        text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        yield from _list_of_objects(text, path)
    else:
        yield from read_jsonl(path)


def _list_of_objects(text: str, path: Path) -> Records:
    # Elements are decoded one by one, since parsing the whole list would lose their places.
    at = _skip_space(text, text.index("[") + 1)
    line, counted = 1, 0
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        where = f"{path}:{line}"
        try:
            record, end = _JSON.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}:{error.lineno}: not JSON: {error.msg}, column {error.colno}"
            ) from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: {error}") from error
        yield where, _object(record, where)
        end = _skip_space(text, end)
        at = _skip_space(text, end + 1) if text[end : end + 1] == "," else end
        if at == end and text[end : end + 1] != "]":
            raise ValueError(f"{where}: not JSON: expected ',' or ']' after the object")
    if text[at + 1 :].strip():
        raise ValueError(f"{path}: not JSON: there is more behind the list")


def _skip_space(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at


def _read_csv(path: Path) -> Records:
    with _in_utf8(path), path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        rows = _csv_rows(reader, path)
        _, names = next(rows, (0, []))
        if len(set(names)) < len(names):
            raise ValueError(f"{path}:1: expected a name for each column, got {names}")
        for line, cells in rows:
            if len(cells) != len(names):
                raise ValueError(
                    f"{path}:{line}: expected {len(names)} cells ({', '.join(names)}), "
                    f"got {len(cells)}"
                )
            yield f"{path}:{line}", dict(zip(names, cells, strict=True))


def _csv_rows(reader: Any, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield each row that is not blank and the line where it begins: cells may hold line ends."""
    while True:
        line = reader.line_num + 1
        limit = csv.field_size_limit(_LARGEST_CELL)
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{path}:{line}: not CSV: {error}") from error
        finally:
            csv.field_size_limit(limit)
        if cells is None:
            return
        if cells:
            yield line, cells


def _read_parquet(path: Path) -> Records:
    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not Parquet: {error}") from error
    for index, record in enumerate(in_own_digits(table.to_pylist(), table.schema)):
        yield f"{path}: row {index}", record


def in_own_digits(
    records: Iterable[Mapping[str, Any]], schema: pyarrow.Schema
) -> Iterator[dict[str, Any]]:
    """Yield a table's records; columns in half or single precision hold decimals.

    As Python's floats their numbers have more digits: 0.1 in single precision is written as
    0.10000000149011612.
    """
    kinds = {pyarrow.float16(): np.float16, pyarrow.float32(): np.float32}
    short = {field.name: kinds[field.type] for field in schema if field.type in kinds}
    for record in records:
        digits = {n: str(kind(record[n])) for n, kind in short.items() if record[n] is not None}
        yield {**record, **{name: Decimal(number) for name, number in digits.items()}}


def _object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}")
    return record


FORMATS: dict[str, Callable[[Path], Records]] = {
    ".jsonl": read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
