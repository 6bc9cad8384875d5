from __future__ import annotations

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest

from latro.tasks.own_rows import own_row
from latro.tasks.records import FORMATS, read_jsonl, read_records

ROWS = [{"prompt": "a\nb", "answer": "1"}, {"prompt": 'say "c, d"', "answer": "2"}]


def written(folder, suffix, rows=ROWS):
    path = folder / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in rows))
    elif suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif suffix == ".csv":
        path.write_text('prompt,answer\n"a\nb",1\n\n"say ""c, d""",2\n')
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize(
    ("suffix", "places"),
    [
        (".jsonl", [":1", ":3"]),
        (".json", [":2", ":6"]),
        (".csv", [":2", ":5"]),
        (".parquet", [": row 0", ": row 1"]),
    ],
)
def test_each_format_gives_its_records_and_where_they_begin(tmp_path, suffix, places):
    path = written(tmp_path, suffix)
    assert list(read_records(path)) == [
        (f"{path}{place}", row) for place, row in zip(places, ROWS, strict=True)
    ]


def test_a_cell_of_csv_may_be_as_long_as_a_prompt(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,answer\n" + "x " * 100_000 + ",1\n")
    before = csv.field_size_limit()
    ((_, record),) = read_records(path)
    assert len(record["prompt"]) == 200_000
    assert csv.field_size_limit() == before


def test_a_json_file_may_hold_an_object_a_line(tmp_path):
    path = written(tmp_path, ".jsonl").rename(tmp_path / "rows.json")
    assert [where for where, _ in read_records(path)] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize("kind", [pyarrow.float16(), pyarrow.float32(), pyarrow.float64()])
def test_numbers_of_a_table_have_the_digits_of_their_precision(tmp_path, kind):
    given = [0.5, 0.125, 3.0, None] if kind == pyarrow.float16() else [0.1, 2.5, 1e-7, None]
    numbers = pyarrow.array(given, pyarrow.float32()).cast(kind) if kind.bit_width < 64 else given
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"answer": numbers}), path)
    found = [record["answer"] for _, record in read_records(path)]
    assert [None if n is None else float(n) for n in found] == given


@pytest.mark.parametrize("name", ["r.json", "r.jsonl"])
@pytest.mark.parametrize(
    ("number", "answer"),
    [
        *(("3.10", "3.10"), ("0.00", "0.00"), ("-1.50", "-1.50"), ("7", "7"), ("2.5e-1", "0.25")),
        ("0.12345678901234567890", "0.12345678901234567890"),
        ("1e-999999999", "0.0"),
    ],
)
def test_a_number_of_json_keeps_the_digits_that_it_is_written_in(tmp_path, name, number, answer):
    record = f'{{"prompt": "How much?", "answer": {number}}}'
    (tmp_path / name).write_text(f"[{record}]" if name == "r.json" else record)
    assert [own_row(found, "r")["answer"] for _, found in read_records(tmp_path / name)] == [answer]


@pytest.mark.parametrize("text", ["[]", " [ \n ] \n", ""])
def test_an_empty_file_of_json_has_no_records(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text)
    assert list(read_records(path)) == []


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_is_no_text(tmp_path, suffix):
    path = written(tmp_path, suffix)
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert [record for _, record in read_records(path)] == ROWS


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("r.jsonl", '{"a": 1}\n{"a": 1,}', r"r\.jsonl:2: not JSON: .*, column"),
        ("r.jsonl", '{"a": 1}\n[1]', r"r\.jsonl:2: expected a JSON object, got list"),
        ("r.jsonl", '{"a": 1}\n{"a": ' + "9" * 5000 + "}", r"r\.jsonl:2: .*limit \(4300 digits\)"),
        ("r.json", '[{"a": 1},\n{"a": ' + "9" * 5000 + "}]", r"r\.json:2: .*limit \(4300 digits\)"),
        ("r.json", '[{"a": 1},\n{"a": }]', r"r\.json:2: not JSON: Expecting value, column 7"),
        ("r.json", '[{"a": 1},\n\n"b"]', r"r\.json:3: expected a JSON object, got str"),
        ("r.json", '[{"a": 1}\n{"a": 2}]', r"r\.json:1: .*expected ',' or '\]' after the object"),
        ("r.json", '[{"a": 1},\n{"a": 2}', r"r\.json:2: .*expected ',' or '\]' after the object"),
        ("r.json", "[{}] 1", r"r\.json: not JSON: there is more behind the list"),
        ("r.json", "[{},", r"r\.json:1: not JSON: Expecting value"),
        ("r.csv", "a,b\n1,2\n\n3\n", r"r\.csv:4: expected 2 cells \(a, b\), got 1"),
        ("r.csv", "a,b\n1,2,3\n", r"r\.csv:2: expected 2 cells \(a, b\), got 3"),
        ("r.csv", "a,a\n1,2\n", r"r\.csv:1: expected a name for each column, got \['a', 'a'\]"),
        ("r.csv", 'a,b\n1,2\n"3,4\n', r"r\.csv:3: not CSV: "),
        ("r.parquet", "PAR", r"r\.parquet: not Parquet: "),
        ("r.txt", "", rf"r\.txt: expected a file in {', '.join(FORMATS)}, got '\.txt'"),
        ("r", "", r"got ''"),
    ],
)
def test_what_is_malformed_is_named_with_its_place(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        list(read_records(tmp_path / name))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_another_encoding_is_named_with_the_file(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes('prompt,answer\n"é",1\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"rows\{suffix}: expected text in UTF-8"):
        list(read_records(path))
    if suffix == ".jsonl":
        with pytest.raises(ValueError, match=r"rows\.jsonl: expected text in UTF-8"):
            list(read_jsonl(path))
