from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from benchmarks import decode_attention, gather_logprob, group_advantage, linear_kl
from benchmarks.common import ops
from benchmarks.common.problem import relative_error

BENCHMARKS = {
    "gather_logprob": (gather_logprob, ["fp32", "bf16"]),
    "linear_kl": (linear_kl, ["fp32", "bf16"]),
    "group_advantage": (group_advantage, ["fp32"]),
    "decode_attention": (decode_attention, ["fp32", "bf16"]),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_quick_run_writes_the_op_in_every_dtype(name, tmp_path, capsys):
    benchmark, dtypes = BENCHMARKS[name]
    benchmark.main(["--quick", "--device", "cpu", "--reps", "2", "--out", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    assert path.name == "ops.json"
    result = json.loads(path.read_text())
    assert result.keys() == {"sizes", "rows", "environment"}
    names = (
        {name, "linear_kl of q", "linear_jsd", "linear_topk_kl"} if name == "linear_kl" else {name}
    )
    assert {row["op"] for row in result["rows"]} == names
    assert list(dict.fromkeys(row["dtype"] for row in result["rows"])) == dtypes
    assert all(row["error"] < 1e-2 for row in result["rows"])
    assert all(row["low"] <= row["median"] <= row["high"] for row in result["rows"])
    assert name in capsys.readouterr().out


@pytest.mark.parametrize("name", BENCHMARKS)
def test_all_ways_give_the_same(name):
    torch.manual_seed(0)
    benchmark, dtypes = BENCHMARKS[name]
    made = list(benchmark.ops(ops.QUICK, torch.device("cpu")))
    assert list(dict.fromkeys(op.dtype for op in made)) == dtypes
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
    # A second measurement replaces the rows of the first.
    assert measure("group_advantage").count("group_advantage") == 2
    assert "not kept" not in capsys.readouterr().out

    result = json.loads(path.read_text())
    result["environment"]["torch"] = "1.0"
    path.write_text(json.dumps(result))
    assert set(measure("gather_logprob")) == {"gather_logprob"}
    assert "of another environment, and is not kept" in capsys.readouterr().out


def test_rates_are_of_what_is_moved(tmp_path):
    group_advantage.main(["--quick", "--device", "cpu", "--reps", "2", "--out", str(tmp_path)])
    row, _ = json.loads((tmp_path / "ops.json").read_text())["rows"]
    moved = row["bytes_per_second"] * row["median"]
    # Two inputs of a thousand rows are read, and one coefficient per row is written.
    assert 4 * 2 * 1000 < moved < 4 * 3 * 1000


def test_a_backend_that_cannot_run_is_left_out_with_its_reason(capsys):
    truth = torch.ones(1)

    def broken() -> torch.Tensor:
        raise NotImplementedError("no kernel for this")

    ways = {"latro-cuda": {"forward": broken}, "plain": {"forward": lambda: truth}}
    op = ops.Op("op", dtype="fp32", ways=ways, moved={}, truth=truth)
    rows = ops.measure(op, torch.device("cpu"), reps=1, copy_bytes=1 << 10)
    assert [(row["way"], row["error"]) for row in rows] == [("plain", 0.0)]
    said = "op fp32: cannot run: latro-cuda: NotImplementedError: no kernel for this\n"
    assert capsys.readouterr().err == said


def test_both_backends_of_a_gpu_are_ways_of_their_own():
    assert ops.BACKENDS["cuda"] == {"latro-triton": "triton", "latro-cuda": "cuda"}


def test_every_backward_in_place_gives_the_gradient_of_the_logits():
    logits = torch.randn(5, 33, dtype=torch.bfloat16)
    target, grad = torch.randint(33, (5,)), torch.randn(5)
    way = partial(gather_logprob.in_place, target=target, backend="cpu")
    laps = ops.differentiated(way, logits, grad)
    expected = logits.float().log_softmax(1).gather(1, target[:, None]).squeeze(1)
    torch.testing.assert_close(laps["forward"]().detach(), expected, rtol=1e-5, atol=1e-5)
    (gradient,) = laps["backward"]()
    assert gradient.dtype == torch.bfloat16
    leaf = logits.float().requires_grad_()
    plain = gather_logprob.plain(leaf, target)
    (true,) = torch.autograd.grad(plain, leaf, grad)
    assert relative_error(gradient, true.double()) < 1e-2


def test_ragged_layout_covers_all_rows():
    layout = group_advantage.ragged_layout(1000, 8, K=4, device=torch.device("cpu"))
    layout.check(1000)
    lengths = layout.offsets.diff()
    assert len(lengths) == 16
    assert lengths.min() >= 1
    assert lengths.max() > 3 * lengths.min()
