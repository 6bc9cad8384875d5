from __future__ import annotations

import json

import pytest
from rich.console import Console

from benchmarks.common.problem import CPU_SHAPES, GPU_SHAPES
from benchmarks.gpu import goals as gpu_goals
from benchmarks.gpu.stages import ROOT
from benchmarks.linear_logprob import BARE_GEMMS

LLAMA = GPU_SHAPES[0]
RATE = 800e12
FILTER = "full, filter 2^-12 / dense GEMMs"


def summary(median: float) -> dict:
    return {"median": median, "low": median, "high": median, "reps": 5}


def row(provider: str, *, error: float | None = 1e-3, same: float = 1.0, **medians: float) -> dict:
    return {
        "shape": {"name": LLAMA.name, "n": LLAMA.n, "h": LLAMA.h, "v": LLAMA.v},
        "dtype": "bf16",
        "provider": provider,
        "times": {phase: summary(median) for phase, median in medians.items()},
        "multiples": {"full": 0.9},
        "error": {"logp": error, "dx": error, "dw": error, "dx_peaked": None},
        "more": {} if provider == BARE_GEMMS else {"same bits": same},
    }


def op(name: str, lap: str, way: str, seconds: float, share: float) -> dict:
    rates = {"bytes_per_second": share * 3e12, "copy_bytes_per_second": 3e12}
    dtype = "bf16" if name == "gather_logprob" else "fp32"
    return {"op": name, "lap": lap, "way": way, "dtype": dtype, "median": seconds, **rates}


SMALL_LM = {"shape": {"name": "small-lm-400", "n": 2048, "h": 512, "v": 8192}}
BARE = row(BARE_GEMMS, error=None, forward=11e-3, full=33e-3)
RESULTS = {
    "chip": {
        "copy": {"per_second": summary(3e12)},
        "gemm": {"per_second": summary(RATE)},
    },
    "head": {
        "rows": [
            BARE,
            row("latro-triton", forward=12e-3, full=52e-3, error=1e-3),
            row("latro-cuda", forward=14e-3, full=45e-3, error=3e-3, same=0.0),
            row("unfused", forward=30e-3, full=90e-3, error=1e-3),
        ]
    },
    "peers": {
        "rows": [
            BARE,
            row("latro-triton", forward=12e-3, full=52e-3),
            row("latro-cuda", forward=14e-3, full=45e-3),
            row("unfused", forward=30e-3, full=90e-3),
            row("liger", forward=20e-3, full=40e-3),
        ]
    },
    "forms": {
        "groups": [
            {
                "section": "full",
                "rows": [
                    BARE,
                    row("latro-triton-3gib", full=38e-3),
                    row("latro-triton-keep", full=36e-3),
                    row("latro-cuda-3gib", full=39e-3),
                ],
            },
            {"section": "frozen", "rows": [BARE, row("latro-triton", full=29e-3)]},
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
            op("gather_logprob", "forward", "latro-triton", 8e-4, 0.84),
            op("gather_logprob", "forward", "latro-cuda", 7e-4, 0.9),
            op("gather_logprob", "forward", "plain", 1e-4, 6.0),
            op("gather_logprob", "backward", "latro-cuda, in place", 17e-4, 0.8),
            op("group_advantage", "forward", "latro-cuda", 12e-6, 0.3),
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
        "full, 3 GiB: 1.2 × floor": (pytest.approx(38), "latro-triton-3gib", True),
        "full, 512 MiB": (pytest.approx(45), "latro-cuda", True),
        "full, frozen head: 1.25 × floor": (pytest.approx(29), "latro-triton", False),
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
    assert found["all shapes", "same bits on two runs"].measured == pytest.approx(5 / 6)
    assert found["all shapes", "same bits on two runs"].met is False
    assert found["small-lm-400", FILTER].measured == 0.9
    assert found["small-lm-400", FILTER].by == "latro-triton-keep, eps 2^-12"
    gather = [found["gather_logprob", f"{lap} / copy bandwidth"] for lap in ("forward", "backward")]
    assert [(goal.measured, goal.by, goal.met) for goal in gather] == [
        (pytest.approx(0.9), "latro-cuda", True),
        (pytest.approx(0.8), "latro-cuda, in place", False),
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
    found = {
        goal.what: goal
        for goal in gpu_goals.goals({"head": {"rows": rows}, "peers": {"rows": rows}})
    }
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


def test_published_times_stand_beside_ours():
    console = Console(width=200, record=True)
    console.print(gpu_goals.published_table(RESULTS))
    lines = [line for line in console.export_text().splitlines() if "│" in line]
    cells = [[cell.strip() for cell in line.strip("│").split("│")][1:] for line in lines]
    assert cells == [
        ["forward", "12.3", "12.0", "llama-3.1-8b"],
        ["full", "50.2", "45.0", "llama-3.1-8b"],
        ["bare GEMMs", "42.0", "–", "qwen2.5-7b"],
        ["full", "167.0", "–", "qwen2.5-7b"],
    ]


def test_figures():
    watched = {"cases": 5, "launchers": ["a", "b"], "failures": ["x"]}
    figure = {
        "sanitize": gpu_goals.sanitize_figure(watched),
        "chip": gpu_goals.chip_figure(RESULTS["chip"]),
        "peers": gpu_goals.logprob_figure(RESULTS["peers"]),
        "forms": gpu_goals.forms_figure(RESULTS["forms"]),
        "ops": gpu_goals.ops_figure(RESULTS["ops"]),
    }
    assert figure == {
        "sanitize": "5 cases over 2 launchers, 1 wrong",
        "chip": "copy 3.00 TB/s, bf16 GEMM 800 TFLOP/s",
        "peers": "full, llama-3.1-8b: latro-cuda 45.0 ms; liger 40.0 ms",
        "forms": "full: latro-triton-3gib 38.0 ms; frozen: latro-triton 29.0 ms; 1 of 2 aims met",
        "ops": "gather_logprob forward 700 µs, 90 % of a copy's rate; "
        "gather_logprob backward 1700 µs, 80 % of a copy's rate; "
        "group_advantage forward 12 µs, 30 % of a copy's rate",
    }


def test_figures_of_nothing_measured():
    assert gpu_goals.logprob_figure({"rows": []}) == "none could run"
    assert gpu_goals.ops_figure({"rows": []}) == "none could run"
    forms = gpu_goals.forms_figure({"groups": [], "checks": []})
    assert forms == "full: none; frozen: none; 0 of 0 aims met"
