"""What is measured on a GPU, on the CPU and small: the numbers mean nothing, their form does."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import linear_logprob
from benchmarks.common.problem import Shape
from benchmarks.common.providers import discover
from benchmarks.gpu import goals as gpu_goals
from benchmarks.gpu import measure as gpu_measure
from benchmarks.gpu.measure import FORMS, OpSizes

CPU = torch.device("cpu")
SIZES = OpSizes(N=17, V=301, rows=1000, S=8, K=4, copy_bytes=1 << 16)


def test_chip():
    found = gpu_measure.measure_chip(CPU, copy_bytes=1 << 16, gemm_size=64)
    for name, work in (("copy", 2 << 16), ("gemm", 20 * 64**3)):
        seconds, rate = found[name]["seconds"], found[name]["per_second"]
        assert found[name]["work"] == work
        assert rate["low"] == pytest.approx(work / seconds["high"])
        assert rate["high"] == pytest.approx(work / seconds["low"])
        assert rate["low"] <= rate["median"] <= rate["high"]
    assert gpu_goals.chip_figure(found).startswith("copy ")


def test_ops():
    found = gpu_measure.measure_ops(CPU, SIZES, ("cpu", "triton"))
    assert [(row["op"], row["lap"], row["backend"]) for row in found["rows"]] == [
        ("gather_logprob", "forward", "cpu"),
        ("gather_logprob", "backward", "cpu"),
        ("group_advantage", "forward", "cpu"),
    ]
    forward, backward, group = found["rows"]
    assert (forward["bytes"], backward["bytes"]) == (17 * 301 * 2, 2 * 17 * 301 * 2)
    assert 4 * 2 * 1000 < group["bytes"] < 4 * 3 * 1000
    copy_rate = found["copy"]["bytes"] / found["copy"]["seconds"]["median"]
    for row in found["rows"]:
        rate = row["bytes"] / row["seconds"]["median"]
        assert row["share_of_copy"] == pytest.approx(rate / copy_rate)
    assert len(found["cannot_run"]) == 2
    assert "gather_logprob triton: " in found["cannot_run"][0]


def test_every_lap_of_gather_starts_from_the_same_logits():
    logits = torch.randn(5, 33, dtype=torch.bfloat16)
    target, grad = torch.randint(33, (5,)), torch.randn(5)
    steps = gpu_measure.GatherLaps(logits, target, grad, "cpu")
    forwards, gradients = [], []
    for _ in range(2):
        steps.restore()
        forwards.append(steps.forward())
        steps.forward_grad()
        gradients.append(steps.backward().clone())  # it stands where the logits stood
    expected = logits.float().log_softmax(1).gather(1, target[:, None]).squeeze(1)
    torch.testing.assert_close(forwards[0], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(*forwards)
    assert torch.equal(*gradients)
    assert gradients[0].dtype == torch.bfloat16


def test_ragged_layout_covers_all_rows():
    layout = gpu_measure.ragged_layout(1000, 8, 4, CPU)
    layout.check(1000)
    lengths = layout.offsets.diff()
    assert len(lengths) == 16
    assert lengths.min() >= 1
    assert lengths.max() > 3 * lengths.min()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_forms(form, monkeypatch):
    # On the CPU it looks a provider up by name, in another process.
    monkeypatch.setattr(linear_logprob, "measure_memory", lambda *_, **__: {"full": None})
    found, _ = discover(["latro-cpu"], CPU, torch.bfloat16)
    limits = linear_logprob.Limits(reps=1, seconds=1.0, truth_flop=1e9)
    shape = Shape("small", n=16, h=32, v=301)
    (bare, ours), reasons = gpu_measure.measure_form(form, shape, found, CPU, limits)
    assert reasons == {}
    assert bare.provider == f"bare GEMMs, {form.name}"
    assert ours.provider == f"latro-cpu, {form.name}"
    assert ours.more == {"same bits": 1.0}
    assert (ours.error["dw"] is None) == form.frozen
    assert ours.times.keys() == {"full"}


def test_forms_end_their_providers_names_as_the_goals_look_for_them():
    assert [form.name for form in FORMS] == [gpu_goals.THREE_GIB, gpu_goals.FROZEN]


def test_without_a_gpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_measure.main(["chip", "--out", str(tmp_path)])
    assert "there is no CUDA GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_cold_clock_leaves_out_what_the_host_takes():
    clock = gpu_measure.clock_for(torch.device("cuda"))
    x = torch.zeros(1 << 20, device="cuda")
    seconds = []
    for _ in range(3):
        clock.mark()
        time.sleep(2e-4)
        x.add_(1)
        clock.mark()
        seconds += clock.laps()
    assert len(seconds) == 3
    assert 0 < min(seconds) < 1e-4
