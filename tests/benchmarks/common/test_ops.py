from __future__ import annotations

import json

import pytest
import torch

from benchmarks import gather_logprob, group_advantage, linear_kl
from benchmarks.common import ops
from benchmarks.common.problem import relative_error

BENCHMARKS = {
    "gather_logprob": (gather_logprob, ["fp32", "bf16"]),
    "linear_kl": (linear_kl, ["fp32", "bf16"]),
    "group_advantage": (group_advantage, ["fp32"]),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_quick_run_writes_the_op_in_every_dtype(name, tmp_path, capsys):
    benchmark, dtypes = BENCHMARKS[name]
    benchmark.main(["--quick", "--device", "cpu", "--reps", "2", "--out", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    assert path.name == "ops.json"
    result = json.loads(path.read_text())
    assert result.keys() == {"sizes", "rows", "environment"}
    assert {row["op"] for row in result["rows"]} == {name}
    assert list(dict.fromkeys(row["dtype"] for row in result["rows"])) == dtypes
    assert all(row["error"] < 1e-2 for row in result["rows"])
    assert all(row["low"] <= row["median"] <= row["high"] for row in result["rows"])
    assert name in capsys.readouterr().out


@pytest.mark.parametrize("name", BENCHMARKS)
def test_all_ways_give_the_same(name):
    torch.manual_seed(0)
    benchmark, dtypes = BENCHMARKS[name]
    made = list(benchmark.ops(ops.QUICK, torch.device("cpu")))
    assert [op.dtype for op in made] == dtypes
    for op in made:
        first, *others = (
            {lap: ops.value(run()) for lap, run in laps.items()} for laps in op.ways.values()
        )
        for other in others:
            for lap, expected in first.items():
                assert relative_error(other[lap], expected.double()) < 2e-2, f"{op.name} {lap}"


def test_the_rows_of_other_ops_are_kept_where_they_were_made_alike(tmp_path, capsys):
    path = tmp_path / "ops.json"

    def measure(name, *options):
        BENCHMARKS[name][0].main(
            ["--quick", "--device", "cpu", "--reps", "1", "--out", str(tmp_path), *options]
        )
        return [row["op"] for row in json.loads(path.read_text())["rows"]]

    assert measure("group_advantage") == ["group_advantage"] * 2
    first = json.loads(path.read_text())["rows"]
    assert set(measure("gather_logprob")) == {"group_advantage", "gather_logprob"}
    assert json.loads(path.read_text())["rows"][:2] == first
    # Measured anew, rows stand once.
    assert measure("group_advantage").count("group_advantage") == 2
    assert "not kept" not in capsys.readouterr().out

    result = json.loads(path.read_text())
    result["environment"]["torch"] = "1.0"
    path.write_text(json.dumps(result))
    assert set(measure("gather_logprob")) == {"gather_logprob"}
    assert "of another environment, and is not kept" in capsys.readouterr().out
