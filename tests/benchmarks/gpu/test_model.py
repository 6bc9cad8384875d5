from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

pytest.importorskip("triton")

import triton

from benchmarks.common.problem import GPU_SHAPES
from benchmarks.gpu import model, predicted
from benchmarks.gpu.compiled import NoCuobjdumpError
from latro_kernels.linear_logprob.triton import fused
from tests.benchmarks.gpu.test_goals import RESULTS

H100 = model.CHIPS["h100"]
LLAMA = GPU_SHAPES[0]
UNIT = 2 * LLAMA.n * LLAMA.h * LLAMA.v
"""Operations of one of the three products."""


def whole(chip: model.Chip) -> dict[str, float]:
    return {name: time.whole for name, time in model.predict(chip, LLAMA, model.counts(chip))}


@pytest.mark.parametrize("capability", sorted({chip.capability for chip in model.CHIPS.values()}))
def test_the_counts_are_those_of_the_compiler(capability: int) -> None:
    """After a change of the kernels: `python benchmarks/gpu/model.py --compile`."""
    saved = json.loads(model.COUNTS.read_text())
    if saved["triton"] != triton.__version__:
        pytest.skip(f"counted with Triton {saved['triton']}, this is {triton.__version__}")
    try:
        found = model.count(capability)
    except NoCuobjdumpError as missing:
        pytest.skip(str(missing))
    assert {name: vars(of) for name, of in found.items()} == saved["kernels"][str(capability)]


@pytest.mark.parametrize("chip", model.CHIPS.values(), ids=list(model.CHIPS))
def test_no_form_is_faster_than_its_products(chip: model.Chip) -> None:
    found = whole(chip)
    of_forms = dict.fromkeys(model.FULL, 3) | {"forward": 1, "dz, no products kept": 1}
    if chip.capability == 90:
        for name in list(of_forms):
            of_forms[f"{name}{model.SPECIALIZED}"] = of_forms[name]
            assert found[f"{name}{model.SPECIALIZED}"] < found[name]
    of_forms[model.FROZEN] = 2
    assert set(found) == set(of_forms)
    for name, products in of_forms.items():
        assert found[name] > products * UNIT / (chip.flops * chip.gemm)
    assert found["full, all products kept"] < found["full, 3 GiB"] < found["full, none kept"]


def test_products_alone_are_counted_in_whole_rounds() -> None:
    """64 blocks of rows by 126 times four blocks of columns, in 62 rounds of 132."""
    time = model.forward(H100, LLAMA, {"forward": model.Count(4000, 1)}, budget=0)
    operations = 62 * 132 * 4 * 2 * 128 * 256 * LLAMA.h
    assert time.products == pytest.approx(operations / (H100.flops * H100.gemm * H100.loop))
    assert time.memory == 0
    assert time.epilogue == pytest.approx(62 * 4 * 4000 * 2 / H100.clock)


def test_an_epilogue_comes_on_top_or_under_the_next_block() -> None:
    instructions = 4000
    alone = model.fused_kernel(
        H100, model.Count(instructions, 1), (8192, 8192, 4096), tiles=1, written=0
    )
    # Two warps of each scheduler; 2048 blocks of products in 16 rounds.
    assert alone.epilogue == pytest.approx(16 * instructions * 2 / H100.clock)
    beside = model.fused_kernel(
        H100, model.Count(instructions, 2), (8192, 8192, 4096), tiles=1, written=0
    )
    assert beside.epilogue == 0
    assert beside.products == pytest.approx(alone.products)


@pytest.mark.parametrize(
    ("name", "run"), [("forward", partial(model.forward, budget=0)), ("grad", model.dz)]
)
def test_a_warp_specialised_block_is_in_its_epilogue_by_halves(name: str, run: Any) -> None:
    kernels = model.counts(H100)
    of_halves = kernels[f"{name}{model.SPECIALIZED}"]
    whole = run(H100, LLAMA, {name: kernels[name]})
    halves = run(H100, LLAMA, {name: of_halves})
    assert (of_halves.resident, of_halves.parts) == (1, 2)
    assert halves.products == pytest.approx(whole.products)
    assert halves.epilogue == 0 < whole.epilogue


def test_few_instructions_leave_the_exponentials() -> None:
    time = model.fused_kernel(H100, model.Count(10, 1), (128, 256, 4096), tiles=1, written=0)
    assert time.epilogue == pytest.approx(128 * 256 / 16 / H100.clock)


def test_slow_memory_is_waited_for() -> None:
    slow = replace(H100, bandwidth=H100.bandwidth / 100)
    kernel = model.Count(0, 1)
    written = 4 * 8192 * 8192
    time = model.fused_kernel(slow, kernel, (8192, 8192, 16), tiles=1, written=written)
    moved = 2 * 16 * (4 * 8192 + 8192) + written
    exact = moved / (slow.bandwidth * slow.copy)
    assert time.products + time.memory == pytest.approx(exact)
    assert 64 // fused.GROUP == 4


def test_a_faster_memory_helps_what_waits_for_it() -> None:
    h200 = model.CHIPS["h200"]
    forms, faster = whole(H100), whole(h200)
    assert faster[model.FROZEN] < forms[model.FROZEN]
    for op, time in model.predict_ops(h200).items():
        ratio = H100.bandwidth / h200.bandwidth
        assert time.whole == pytest.approx(ratio * model.predict_ops(H100)[op].whole)


def test_predictions_stand_beside_what_was_measured() -> None:
    found = {(of.where, of.what): of for of in predicted.compared(RESULTS, H100.device)}
    forward = found[LLAMA.name, "forward"]
    assert forward.measured == pytest.approx(12)
    assert forward.predicted == pytest.approx(1e3 * whole(H100)["forward"])
    # The results' GPU multiplies at 800e12 operations a second.
    own = model.at_rates(H100, gemm=800e12, copy=3e12)
    assert forward.at_rates == pytest.approx(1e3 * whole(own)["forward"])
    assert forward.ratio == pytest.approx(12 / forward.at_rates)
    assert found[LLAMA.name, model.DEFAULT].measured == pytest.approx(52)
    assert found[LLAMA.name, "full, 3 GiB"].measured == pytest.approx(38)
    assert found[LLAMA.name, "full, all products kept"].measured == pytest.approx(36)
    assert found[LLAMA.name, "full, none kept"].measured is None
    assert found[LLAMA.name, model.FROZEN].measured == pytest.approx(29)
    assert found["gather_logprob", "forward"].measured == pytest.approx(0.7)
    assert found[H100.name, "bf16 GEMM"].measured == pytest.approx(800)
    assert found["mistral-7b", "forward"].measured is None


def test_what_was_measured_was_made_as_was_chosen() -> None:
    for chosen in (False, True):
        tuning = {"tuning": [{"config": {"warp_specialized": chosen}}]}
        found = {
            of.what: of
            for of in predicted.compared(RESULTS | tuning, H100.device)
            if of.where == LLAMA.name
        }
        for name in ("forward", model.DEFAULT):
            forms = (name, f"{name}{model.SPECIALIZED}")
            assert [found[form].measured is not None for form in forms] == [not chosen, chosen]
        assert found[model.FROZEN].measured is not None


def test_nothing_measured_is_still_predicted() -> None:
    found = predicted.compared({}, "NVIDIA H200")
    assert all(of.measured is None and of.at_rates is None and of.ratio is None for of in found)
    assert all(of.predicted > 0 for of in found)
    assert len(predicted.table(found).rows) == len(found)


def test_an_unknown_gpu_has_no_predictions() -> None:
    assert predicted.compared(RESULTS, "NVIDIA H100 PCIe") == []


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    model.main(["--chip", "a100"])
    said = capsys.readouterr().out
    assert "A100 SXM, 80 GB" in said
    assert all(shape.name in said for shape in GPU_SHAPES)
