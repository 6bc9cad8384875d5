"""Malformed data files end in one line with file and place, exit code 1, and no lost file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from latro.config.training import SMALL_MODEL
from tests.latro.hostile import ROWS, Case, Place, refused
from tests.warm_process import WarmProcess

GOOD = ROWS[0]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path / "place")
    place.root.mkdir()
    # Data is read before the model, so the small model that ships will do.
    place.arguments |= {"model_name_or_path": SMALL_MODEL}
    return place


def raw(content: bytes | str, name: str = "data.jsonl") -> Callable[[Place], None]:
    """Return a case: a file with this content."""

    def spoil(place: Place) -> None:
        path = place.root / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        place.arguments["dataset_name"] = path

    return spoil


def rows(*spoiled: object) -> Callable[[Place], None]:
    """Return a case: good rows and then these."""
    return lambda place: place.write_rows(GOOD, *spoiled)


def row(**changes: object) -> Callable[[Place], None]:
    return rows({**GOOD, **changes})


def line(text: str) -> Callable[[Place], None]:
    """Return a case: a good line and then this one."""
    return raw(json.dumps(GOOD) + "\n" + text + "\n")


def csv(*lines: str) -> Callable[[Place], None]:
    return raw("\n".join(lines) + "\n", "data.csv")


def parquet(table: Callable[[], pyarrow.Table], share: float = 1.0) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        path = place.root / "data.parquet"
        pyarrow.parquet.write_table(table(), path)
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])
        place.arguments["dataset_name"] = path

    return spoil


def folder(*names: str, content: str = "") -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        path = place.root / "folder"
        path.mkdir()
        for name in names:
            (path / name).write_text(content)
        place.arguments["dataset_name"] = path

    return spoil


def good_table() -> pyarrow.Table:
    return pyarrow.Table.from_pylist(ROWS)


def messages(*texts: object) -> Callable[[Place], None]:
    return row(prompt=list(texts))


USER = {"role": "user", "content": "How many?"}
SECOND = "{data}:2: "
FILES = {
    "missing": Case(lambda p: None, "no file {data}"),
    "empty": Case(raw(b""), "{data}"),
    "blank lines": Case(raw("\n \n\t\n"), "{data}"),
    "half a line": Case(line('{"prompt": "How'), SECOND, "latro.sft"),
    "no JSON": Case(line("prompt: How many?"), SECOND),
    "NUL bytes": Case(line("\x00" * 100), SECOND, "latro.evaluate"),
    "not UTF-8": Case(raw(b'{"prompt": "\xff"}'), "{data}.*UTF-8"),
    "UTF-16": Case(raw(json.dumps(GOOD).encode("utf-16")), "{data}.*UTF-8"),
    "binary": Case(raw(bytes(range(256)) * 100), "{data}", "latro.probe"),
    "a deep line": Case(line('{"prompt": ' + "[" * 100_000), SECOND),
    "a long number": Case(line('{"prompt": "a", "answer": ' + "9" * 10_000 + "}"), SECOND),
    "another kind of file": Case(raw("text", "data.txt"), "{root}/data.txt"),
    "a name of no file": Case(lambda p: p.arguments.update(dataset_name="no-such"), "no-such"),
    "brackets in its name": Case(raw("?", "[red].jsonl"), r"{root}/\[red\].jsonl:1"),
    "a line break in its name": Case(raw("?", "a\nb.jsonl"), r"{root}/a b.jsonl:1"),
    "a list that is cut": Case(raw('[{"prompt": "a", "answer": 1},', "data.json"), "data.json:1"),
    "a list of numbers": Case(raw("[1, 2]", "data.json"), "data.json:1"),
    "a deep list": Case(raw("[" * 100_000, "data.json"), "data.json:1"),
    "more behind a list": Case(raw('[{"prompt": "a", "answer": 1}] 1', "data.json"), "data.json"),
    "CSV with a ragged row": Case(csv("prompt,answer", "a,1", "b,2,3"), "data.csv:3"),
    "CSV with an open quote": Case(csv("prompt,answer", '"a,1'), "data.csv:2"),
    "CSV with a huge cell": Case(
        csv("prompt,answer", "a " * 100_000 + ",1", "b " * 100_000 + ",2"),
        r"row 0: a prompt of \d+ tokens .* the model has",
    ),
    "CSV with deep choices": Case(
        csv("prompt,answer,choices", "a,1," + "[" * 100_000), "data.csv:2"
    ),
    "CSV with a column twice": Case(csv("prompt,answer,answer", "a,1,2"), "data.csv:1"),
    "CSV of a header alone": Case(csv("prompt,answer"), "data.csv"),
    "Parquet that is cut": Case(parquet(good_table, 0.6), "data.parquet"),
    "Parquet that is text": Case(raw("PAR1 text PAR1", "data.parquet"), "data.parquet"),
    "Parquet of no rows": Case(parquet(lambda: good_table().slice(0, 0)), "data.parquet"),
    "Parquet of other columns": Case(
        parquet(lambda: pyarrow.table({"question": ["a"], "answer": [b"\xff"]})),
        "data.parquet: row 0",
    ),
    "Parquet of bytes": Case(
        parquet(lambda: pyarrow.table({"prompt": ["a"], "answer": [b"\xff"]})),
        "data.parquet: row 0",
    ),
    "a folder without files": Case(folder(), "{root}/folder"),
    "a folder without splits": Case(folder("data.jsonl", "README.md"), "{root}/folder"),
    "a split twice": Case(folder("train.jsonl", "train.csv"), "{root}/folder"),
    "a split that is empty": Case(folder("train.jsonl", "validation.jsonl"), "{root}/folder"),
}
ROWS_OF_A_FILE = {
    "a number": Case(rows(5), SECOND),
    "a list": Case(rows([GOOD]), SECOND, "latro.sft"),
    "null": Case(rows(None), SECOND),
    "no prompt": Case(rows({"answer": "5"}), SECOND),
    "no answer": Case(rows({"prompt": "How many?"}), SECOND, "latro.evaluate"),
    "other columns": Case(rows({"question": "a", "[/b]": "5"}), SECOND),
    "an empty prompt": Case(row(prompt=" "), SECOND),
    "an empty answer": Case(row(answer=""), SECOND),
    "a prompt that is a number": Case(row(prompt=5), SECOND),
    "a prompt that is an object": Case(row(prompt={"role": "user"}), SECOND),
    "an answer that is null": Case(row(answer=None), SECOND, "latro.probe"),
    "an answer that is true": Case(row(answer=True), SECOND),
    "an answer that is a list": Case(row(answer=["5"]), SECOND),
    "an answer that is deep": Case(row(answer=[[[[{"a": [1]}]]]]), SECOND),
    "an answer of NaN": Case(row(answer=float("nan")), SECOND),
    "an infinite answer": Case(row(answer=float("inf")), SECOND),
    "a huge exponent": Case(line('{"prompt": "a", "answer": 1e999}'), SECOND),
    "half a surrogate pair": Case(line('{"prompt": "\\ud83d", "answer": "5"}'), SECOND),
    "a rationale that is a number": Case(row(rationale=5), SECOND, "latro.sft"),
    "one choice": Case(row(choices=["5"]), SECOND),
    "choices of numbers": Case(row(choices=[1, 2]), SECOND),
    "too many choices": Case(row(choices=[str(i) for i in range(50)]), SECOND),
    "an answer that is no choice": Case(
        lambda p: p.write_rows({**GOOD, "answer": "7", "choices": ["5", "6"]}), "{data}:1: "
    ),
    "messages without any": Case(messages(), SECOND),
    "a message that is text": Case(messages("How many?"), SECOND),
    "a message without a role": Case(messages({"content": "How many?"}), SECOND),
    "an unknown role": Case(
        messages({"role": "oracle", "content": "a"}, USER), SECOND + ".*oracle"
    ),
    "a role that is a list": Case(messages({"role": ["user"], "content": "a"}), SECOND),
    "content that is a list": Case(
        messages({"role": "user", "content": [{"type": "text"}]}), SECOND
    ),
    "the last message is not the user's": Case(
        messages(USER, {"role": "assistant", "content": "5"}), SECOND
    ),
    "a call of a tool": Case(messages({**USER, "tool_calls": [{}]}), SECOND),
    "a long value": Case(row(answer=["x" * 10**6]), SECOND),
    "an escape in a value": Case(row(answer=["\x1b[2J\n\n"]), SECOND),
    "one prompt alone": Case(lambda p: p.write_rows(GOOD, GOOD), "{data}.*validation"),
    "one prompt and the whole file held out": Case(
        lambda p: (p.write_rows(*ROWS), p.arguments.update(eval_split="test")), "eval_split"
    ),
    "a grader that cannot read the answers": Case(
        lambda p: (rows({**GOOD, "answer": "five"})(p), p.arguments.update(grader="number")),
        SECOND,
    ),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"{family}: {name}")
        for family, cases in {"file": FILES, "row": ROWS_OF_A_FILE}.items()
        for name, case in cases.items()
    ],
)
def test_hostile_data_is_refused(
    case: Case, place: Place, warm: WarmProcess, tmp_path: Path
) -> None:
    refused(case, place, warm, tmp_path / "printed")
