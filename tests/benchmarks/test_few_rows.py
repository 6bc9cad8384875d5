from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import few_rows


def test_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few_rows.main(["--quick", "--device", "cpu", "--reps", "2", "--out", str(tmp_path)])
    assert "200 x 40 bf16" in capsys.readouterr().out
    rows = json.loads((tmp_path / "few_rows.json").read_text())["rows"]
    assert len(rows) == 2 * len(few_rows.ROWS) * len(few_rows.WAYS)
    for row in rows:
        assert row["bytes"] == 200 * 40 * (4 if row["dtype"] == "fp32" else 2)
        assert row["bytes_per_second"] == row["bytes"] / row["times"]["median"]


def test_another_device_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"expected cpu, .* got cuda"):
        few_rows.main(["--device", "cuda"])
