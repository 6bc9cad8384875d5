"""Small measurements of a chip, made on the CPU: only the form of the numbers is tested."""

from __future__ import annotations

import json

import pytest

from benchmarks.gpu import chip
from benchmarks.gpu import goals as gpu_goals


def test_rates_are_work_over_time(tmp_path):
    chip.main(["--quick", "--device", "cpu", "--reps", "3", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "chip.json").read_text())
    for name, work in (("copy", 2 << 16), ("gemm", 20 * 64**3)):
        seconds, rate = found[name]["seconds"], found[name]["per_second"]
        assert found[name]["work"] == work
        assert rate["low"] == pytest.approx(work / seconds["high"])
        assert rate["high"] == pytest.approx(work / seconds["low"])
        assert rate["low"] <= rate["median"] <= rate["high"]
    assert gpu_goals.chip_figure(found).startswith("copy ")
