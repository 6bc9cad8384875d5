from __future__ import annotations

import json
from pathlib import Path

import pytest

from latro.files import check_output, replacing, write_json


def test_a_file_appears_whole_with_ordinary_permissions(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"é": [1, 2.5]})
    assert json.loads(path.read_text()) == {"é": [1, 2.5]}
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write_half() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half of the n")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_nan_is_no_json(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_result_is_not_written_over_its_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"output: .*my.json is the data itself"):
        check_output(tmp_path / "my.json", "my.json")
    check_output("other.json", "my.json")
    # The name of a task is not a file.
    check_output("gsm8k.json", "gsm8k")


def test_a_result_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "file").touch()
    for output, message in (
        # The file beside it would be res-3.jsonl, the same as for res-3.6.
        ("res-3.5", "expected a file name that ends in .json"),
        ("lines.jsonl", "expected a file name that ends in .json"),
        ("folder.json", "expected a file, got the folder"),
        ("file/a.json", "expected a place that can be written to"),
    ):
        with pytest.raises(ValueError, match=f"output: {message}"):
            check_output(tmp_path / output, "gsm8k")
    check_output(tmp_path / "new" / "folder" / "a.json", "gsm8k")
    assert not (tmp_path / "new").exists()
