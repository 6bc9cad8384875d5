from __future__ import annotations

import json

import torch

from benchmarks import ops_bench
from benchmarks.problem import relative_error


def test_a_quick_run_writes_every_op(tmp_path, capsys):
    ops_bench.main(["--quick", "--device", "cpu", "--reps", "2", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "ops.json").read_text())
    ran = {(row["op"], row["dtype"]) for row in result["rows"]}
    assert ran == {
        ("gather_logprob", "fp32"),
        ("gather_logprob", "bf16"),
        ("linear_kl", "fp32"),
        ("linear_kl", "bf16"),
        ("group_advantage", "fp32"),
    }
    assert all(row["error"] < 1e-2 for row in result["rows"])
    assert all(row["low"] <= row["median"] <= row["high"] for row in result["rows"])
    assert "gather_logprob" in capsys.readouterr().out


def test_all_ways_give_the_same():
    torch.manual_seed(0)
    for op in ops_bench.ops(ops_bench.QUICK, torch.device("cpu")):
        first, *others = (
            {lap: _tensor(run()) for lap, run in laps.items()} for laps in op.ways.values()
        )
        for other in others:
            for lap, expected in first.items():
                assert relative_error(other[lap], expected.double()) < 2e-2, f"{op.name} {lap}"


def _tensor(result):
    return result if isinstance(result, torch.Tensor) else result.coefficient
