from __future__ import annotations

import json

import pytest
from rich.console import Console

from benchmarks.common.problem import CPU_SHAPES, GPU_SHAPES
from benchmarks.gpu import goals as gpu_goals
from benchmarks.gpu.stages import ROOT

LLAMA = GPU_SHAPES[0]
RATE = 800e12
FILTER = "full, filter 2^-12 / dense GEMMs"


def summary(median: float) -> dict:
    return {"median": median, "low": median, "high": median, "reps": 5}


def row(provider: str, *, error: float | None = 1e-3, more=None, **medians: float) -> dict:
    return {
        "shape": {"name": LLAMA.name, "n": LLAMA.n, "h": LLAMA.h, "v": LLAMA.v},
        "dtype": "bf16",
        "provider": provider,
        "times": {phase: summary(median) for phase, median in medians.items()},
        "multiples": {"full": 0.9},
        "error": {"logp": error, "dx": error, "dw": error, "dx_peaked": None},
        "more": more or {},
    }


def op(name: str, lap: str, backend: str, seconds: float, share: float) -> dict:
    measured = {"seconds": summary(seconds), "share_of_copy": share}
    return {"op": name, "lap": lap, "backend": backend, **measured}


SMALL_LM = {"shape": {"name": "small-lm-400", "n": 2048, "h": 512, "v": 8192}}
RESULTS = {
    "chip": {
        "copy": {"per_second": summary(3e12)},
        "gemm": {"per_second": summary(RATE)},
    },
    "logprob": {
        "rows": [
            row("bare GEMMs", error=None, forward=1e-3, full=3e-3),
            row("latro-triton", forward=12e-3, full=52e-3, error=1e-3),
            row("latro-cuda", forward=14e-3, full=45e-3, error=3e-3),
            row("unfused", forward=30e-3, full=90e-3, error=1e-3),
            row("liger", forward=20e-3, full=40e-3, error=1e-3),
        ]
    },
    "forms": {
        "rows": [
            row("bare GEMMs, 3 GiB", error=None, full=33e-3),
            row("latro-triton, 3 GiB", full=38e-3, more={"same bits": 1.0}),
            row("latro-cuda, 3 GiB", full=39e-3, more={"same bits": 0.0}),
            row("latro-triton, frozen", full=29e-3, more={"same bits": 1.0}),
        ]
    },
    "head": {
        "groups": [
            {"section": "full", "rows": [row("latro-triton-keep, eps 2^-12")]},
            {
                "section": "filter",
                "rows": [
                    row("latro-triton-keep, eps 2^-10") | SMALL_LM,
                    row("latro-triton-keep, eps 2^-12") | SMALL_LM,
                ],
            },
        ],
        "checks": [{"met": True}, {"met": False}],
    },
    "ops": {
        "rows": [
            op("gather_logprob", "forward", "triton", 8e-4, 0.84),
            op("gather_logprob", "forward", "cuda", 7e-4, 0.9),
            op("gather_logprob", "backward", "cuda", 17e-4, 0.8),
            op("group_advantage", "forward", "cuda", 12e-6, 0.3),
        ]
    },
}


def llama(results) -> dict[str, gpu_goals.Goal]:
    return {goal.what: goal for goal in gpu_goals.goals(results) if goal.where == LLAMA.name}


def test_goals_of_the_head_come_from_the_chips_own_rate():
    found = llama(RESULTS)
    unit_ms = 1e3 * LLAMA.n * LLAMA.h * LLAMA.v / RATE
    assert {what: (goal.measured, goal.by, goal.met) for what, goal in found.items()} == {
        "forward: 1.2 × floor": (pytest.approx(12), "latro-triton", True),
        "full, 3 GiB: 1.2 × floor": (pytest.approx(38), "latro-triton, 3 GiB", True),
        "full, 512 MiB": (pytest.approx(45), "latro-cuda", True),
        "full, frozen head: 1.25 × floor": (pytest.approx(29), "latro-triton, frozen", False),
        "forward / fastest peer": (pytest.approx(0.6), "latro-triton / liger", True),
        "full / fastest peer": (pytest.approx(1.125), "latro-cuda / liger", False),
    }
    assert found["forward: 1.2 × floor"].goal == pytest.approx(1.2 * 2 * unit_ms)
    assert found["full, 3 GiB: 1.2 × floor"].goal == pytest.approx(1.2 * 6 * unit_ms)
    assert found["full, 512 MiB"].goal == pytest.approx(50)
    assert found["full, frozen head: 1.25 × floor"].goal == pytest.approx(1.25 * 4 * unit_ms)


def test_goals_of_everything_else():
    found = {(g.where, g.what): g for g in gpu_goals.goals(RESULTS)}
    error = found["all shapes", "error / gate"]
    assert (error.measured, error.by) == (pytest.approx(3e-3 / (2e-3 + 1e-5)), "latro-cuda, logp")
    assert error.met is False
    assert found["all shapes", "same bits on two runs"].measured == pytest.approx(2 / 3)
    assert found["all shapes", "same bits on two runs"].met is False
    assert found["small-lm-400", FILTER].measured == 0.9
    assert found["small-lm-400", FILTER].by == "latro-triton-keep, eps 2^-12"
    gather = [found["gather_logprob", f"{lap} / copy bandwidth"] for lap in ("forward", "backward")]
    assert [(goal.measured, goal.by, goal.met) for goal in gather] == [
        (0.9, "cuda", True),
        (0.8, "cuda", False),
    ]
    group = found["group_advantage", "2^20 rows"]
    assert (group.measured, group.goal, group.met) == (pytest.approx(12), pytest.approx(30), True)


def test_without_results_every_goal_stands_unmeasured():
    found = gpu_goals.goals({})
    assert {goal.where for goal in found} >= {shape.name for shape in GPU_SHAPES}
    assert all(goal.measured is goal.met is None for goal in found)
    assert [goal.what for goal in found] == [goal.what for goal in gpu_goals.goals(RESULTS)]


@pytest.mark.parametrize("stage", RESULTS)
def test_goals_without_one_stage(stage):
    results = {name: result for name, result in RESULTS.items() if name != stage}
    assert len(gpu_goals.goals(results)) == len(gpu_goals.goals(RESULTS))


def test_a_goal_in_milliseconds_needs_the_chips_rate():
    results = {name: result for name, result in RESULTS.items() if name != "chip"}
    found = llama(results)
    forward = found["forward: 1.2 × floor"]
    assert (forward.measured, forward.goal, forward.met) == (pytest.approx(12), None, None)
    assert found["full, 512 MiB"].met is True


def test_goals_of_rows_that_were_measured(monkeypatch):
    path = ROOT / "benchmarks" / "results" / "head" / "study_head.json"
    groups = json.loads(path.read_text())["groups"]
    rows = [row for group in groups if group["section"] == "peers" for row in group["rows"]]
    monkeypatch.setattr(gpu_goals, "GPU_SHAPES", CPU_SHAPES)
    found = {goal.what: goal for goal in gpu_goals.goals({"logprob": {"rows": rows}})}
    assert found["forward: 1.2 × floor"].measured > 0
    assert found["full / fastest peer"].by.startswith("latro-")
    assert found["error / gate"].measured > 0


def test_table_has_a_line_a_goal():
    console = Console(width=200, record=True)
    console.print(gpu_goals.table(gpu_goals.goals(RESULTS)))
    lines = console.export_text().splitlines()
    (line,) = (text for text in lines if "full, 512 MiB" in text and LLAMA.name in text)
    assert [cell.strip() for cell in line.strip("│").split("│")] == [
        *(LLAMA.name, "full, 512 MiB", "45 ms", "≤ 50 ms", "yes", "latro-cuda")
    ]
    (line,) = (text for text in lines if "forward / copy" in text)
    assert "≥ 0.85 ×" in line


def test_figures():
    figure = {
        "tests": gpu_goals.tests_figure({"tests": 9, "failures": 1, "errors": 1, "skipped": 2}),
        "sanitize": gpu_goals.sanitize_figure(
            {"cases": 5, "launchers": ["a", "b"], "failures": ["x"]}
        ),
        "chip": gpu_goals.chip_figure(RESULTS["chip"]),
        "logprob": gpu_goals.logprob_figure(RESULTS["logprob"]),
        "forms": gpu_goals.forms_figure(RESULTS["forms"]),
        "head": gpu_goals.head_figure(RESULTS["head"]),
        "ops": gpu_goals.ops_figure(RESULTS["ops"]),
    }
    assert figure == {
        "tests": "5 passed, 2 failed, 2 skipped",
        "sanitize": "5 cases over 2 launchers, 1 wrong",
        "chip": "copy 3.00 TB/s, bf16 GEMM 800 TFLOP/s",
        "logprob": "full, llama-3.1-8b: latro-cuda 45.0 ms, liger 40.0 ms",
        "forms": "full, llama-3.1-8b: latro-triton, 3 GiB 38.0 ms; latro-triton, frozen 29.0 ms",
        "head": "1 of 2 aims met",
        "ops": "gather_logprob forward 700 µs, 90 % of a copy's rate (cuda); "
        "gather_logprob backward 1700 µs, 80 % of a copy's rate (cuda); "
        "group_advantage forward 12 µs, 30 % of a copy's rate (cuda)",
    }


def test_figures_of_nothing_measured():
    nothing = {"rows": []}
    assert gpu_goals.logprob_figure(nothing).endswith("none could run")
    assert gpu_goals.forms_figure(nothing).endswith("none could run")
    assert gpu_goals.ops_figure(nothing) == "none could run"
