from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from benchmarks.common import figures
from benchmarks.common.timing import Summary


def test_bars_stand_from_the_top_with_labels_and_ranges_on_their_scale():
    axis = Figure().subplots()
    times = [Summary(median=2.0, low=1.0, high=3.0, reps=3)] * 2
    figures.bars(axis, [10.0, 20.0], ["a", "b"], below=0.25, times=times)
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
        figures.bars(axis, [1.0], [""], below=below)
    assert axis.yaxis_inverted()


def test_a_figure_is_written_as_png(tmp_path):
    figures.write(tmp_path / "figure.png", Figure())
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
