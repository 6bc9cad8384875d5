from __future__ import annotations

import argparse
import csv
import re

import pytest
from matplotlib.figure import Figure

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
    names = report.some_of(["a", "b"])
    assert names("b, a") == ["b", "a"]
    with pytest.raises(argparse.ArgumentTypeError, match="expected some of a, b, got 'c'"):
        names("a,c")


def test_csv_is_whole_or_absent(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    with pytest.raises(ValueError, match="rows: expected at least one"):
        report.write_csv(path, [])
    assert not path.exists()
    report.write_csv(path, [{"a": 1, "b": None}, {"a": 2, "c": 3}])
    assert list(csv.reader(path.open())) == [["a", "b", "c"], ["1", "", ""], ["2", "", "3"]]
    assert list(path.parent.iterdir()) == [path]


def test_bars_stand_from_the_top_with_labels_and_ranges_on_their_scale():
    axis = Figure().subplots()
    times = [Summary(median=2.0, low=1.0, high=3.0, reps=3)] * 2
    report.bars(axis, [10.0, 20.0], ["a", "b"], below=0.25, times=times)
    assert axis.yaxis_inverted()
    assert [text.get_text() for text in axis.texts] == ["a", "b"]
    assert [bar.get_width() for bar in axis.patches] == [10.0, 20.0]
    assert [bar.get_y() + bar.get_height() / 2 for bar in axis.patches] == [0.25, 1.25]
    (spread,) = axis.collections
    ends = [segment[:, 0].tolist() for segment in spread.get_segments()]
    assert ends == [pytest.approx([5.0, 15.0]), pytest.approx([10.0, 30.0])]


def test_two_rows_of_bars_keep_the_first_on_top():
    axis = Figure().subplots()
    for below in (-0.2, 0.2):
        report.bars(axis, [1.0], [""], below=below)
    assert axis.yaxis_inverted()


def test_a_figure_is_written_as_png(tmp_path):
    report.write_png(tmp_path / "figure.png", Figure())
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (["--reps", "0"], "--reps: expected an integer of at least 1, got '0'"),
        (["--threads", "-2"], "--threads: expected an integer of at least 1, got '-2'"),
        (["--device", "meta"], "--device: expected cpu, cuda or cuda:N, got 'meta'"),
        (["--out", "/dev/null"], "--out: expected a folder that can be written, got '/dev/null'"),
        (["--out", "/proc/a/b"], "--out: expected a folder that can be written, got '/proc/a/b'"),
    ],
)
def test_an_argument_is_refused_before_anything_is_measured(argument, message, capsys):
    with pytest.raises(SystemExit):
        report.arguments("", reps=3, quick="").parse_args(argument)
    assert re.search(message, capsys.readouterr().err)


def test_a_gpu_that_is_not_there_is_refused():
    args = report.arguments("", reps=3, quick="").parse_args(["--device", "cuda:99"])
    with pytest.raises(SystemExit, match=r"--device: expected a GPU that is there, .* got cuda:99"):
        report.device_of(args)


def test_looking_at_a_folder_leaves_nothing_of_it(tmp_path):
    assert report.folder(str(tmp_path / "new" / "er")) == tmp_path / "new" / "er"
    assert not any(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_one_line_and_leaves_no_part(tmp_path):
    path = tmp_path / "rows.json"
    path.mkdir()
    with pytest.raises(SystemExit, match=r"rows.json: cannot be written: Is a directory"):
        report.write_json(path, {})
    assert list(tmp_path.iterdir()) == [path]
