from __future__ import annotations

import csv

import pytest

from benchmarks.common import report
from benchmarks.common.timing import Summary


def test_names_stand_left_numbers_right_and_multiples_are_bold():
    table = report.table("title", ["name", "ms", "× ours"], [["a", "1", "2"], ["b", "3", "4"]])
    assert [(column.justify, column.no_wrap, column.style) for column in table.columns] == [
        ("left", True, ""),
        ("right", False, ""),
        ("right", False, "bold"),
    ]
    assert [list(column.cells) for column in table.columns] == [["a", "b"], ["1", "3"], ["2", "4"]]


def test_a_time_has_its_range():
    summary = Summary(median=0.0025, low=0.001, high=0.01, reps=3)
    assert report.span(summary, 1e3) == "2.50 (1.00–10.00)"
    assert report.span(summary, 1e3, 0) == "2 (1–10)"


def test_a_size_that_is_not_known_is_a_dash():
    assert (report.mib(None), report.mib(3 << 19), report.mib(3 << 20, 0)) == ("–", "1.5", "3")


def test_names_are_chosen_of_those_known():
    assert report.choose("b, a", ["a", "b"], "--names") == ["b", "a"]
    with pytest.raises(ValueError, match="--names: expected some of a, b, got 'c'"):
        report.choose("a,c", ["a", "b"], "--names")


def test_csv_is_whole_or_absent(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    with pytest.raises(ValueError, match="rows: expected at least one"):
        report.write_csv(path, [])
    with pytest.raises(ValueError, match="'b'"):
        report.write_csv(path, [{"a": 1}, {"b": 2}])
    assert not path.exists()
    report.write_csv(path, [{"a": 1, "b": None}])
    assert list(csv.reader(path.open())) == [["a", "b"], ["1", ""]]
    assert list(path.parent.iterdir()) == [path]
