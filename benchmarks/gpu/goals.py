"""What the GPU suite's results say: one line a stage, and every goal with what was measured.

Goals of `linear_logprob` are in milliseconds, multiples of a floor that this GPU's own bf16 GEMM
rate sets: with N rows, hidden size H and vocabulary V a forward has 2·N·H·V operations at least, a
forward and backward 6·N·H·V with a trainable head and 4·N·H·V with a frozen one. Beside each goal
stands the fastest of our providers. A goal whose stage was skipped or failed has no measured value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table

from benchmarks.common.problem import GPU_SHAPES, Shape
from benchmarks.linear_logprob import BARE_GEMMS, ERRORS

OURS = "latro-"
THREE_GIB, FROZEN = "3 GiB", "frozen"
"""Ends of our providers' names in the stage forms."""

FORWARD = 1.2
FULL_3_GIB = 1.2
FULL_512_MIB_S = {"llama-3.1-8b": 50e-3}
"""512 MiB is the default budget. The other shapes have the same multiple of their floors: 50 ms
where the floor is 33."""
FULL_512_MIB = 1.5
FULL_FROZEN = 1.25
GATHER_SHARE = 0.85
GROUP_ADVANTAGE_S = 30e-6

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Goal:
    """`measured` beside `goal`, the most that it may be, or the least where `at_least`; None where
    there is no number. `by` is whose number it is."""

    where: str
    what: str
    unit: str
    measured: float | None
    goal: float | None
    by: str = ""
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        if self.measured is None or self.goal is None:
            return None
        return self.measured >= self.goal if self.at_least else self.measured <= self.goal


def goals(results: Mapping[str, Any]) -> list[Goal]:
    """Make every goal, from the results of the stages by name."""
    found = [goal for shape in GPU_SHAPES for goal in _head_goals(shape, results)]
    return [*found, _filter_goal(results), *_exactness_goals(results), *_op_goals(results)]


def _head_goals(shape: Shape, results: Mapping[str, Any]) -> Iterator[Goal]:
    logprob, forms = (_rows(results, stage, shape.name) for stage in ("logprob", "forms"))
    budget = [row for row in forms if row["provider"].endswith(THREE_GIB)]
    frozen = [row for row in forms if row["provider"].endswith(FROZEN)]
    rate = results["chip"]["gemm"]["per_second"]["median"] if "chip" in results else None
    unit_s = None if rate is None else shape.n * shape.h * shape.v / rate

    def timed(what: str, rows: Sequence[Row], phase: str, products: int, multiple: float) -> Goal:
        by, seconds = _fastest(rows, phase, ours=True)
        goal = None if unit_s is None else 1e3 * multiple * products * unit_s
        return Goal(shape.name, f"{what}: {multiple} × floor", "ms", _ms(seconds), goal, by)

    yield timed("forward", logprob, "forward", 2, FORWARD)
    yield timed("full, 3 GiB", budget, "full", 6, FULL_3_GIB)
    default = timed("full, 512 MiB", logprob, "full", 6, FULL_512_MIB)
    if shape.name in FULL_512_MIB_S:
        default = replace(default, what="full, 512 MiB", goal=_ms(FULL_512_MIB_S[shape.name]))
    yield default
    yield timed("full, frozen head", frozen, "full", 4, FULL_FROZEN)
    for phase in ("forward", "full"):
        by, seconds = _fastest(logprob, phase, ours=True)
        peer, its_seconds = _fastest(logprob, phase, ours=False)
        ratio = seconds / its_seconds if seconds and its_seconds else None
        who = f"{by} / {peer}" if ratio else ""
        yield Goal(shape.name, f"{phase} / fastest peer", "×", ratio, 1.0, who)


def _filter_goal(results: Mapping[str, Any]) -> Goal:
    """Compare the head study's filter on trained hidden states with the three dense products."""
    groups = results.get("head", {"groups": []})["groups"]
    rows = [
        row
        for group in groups
        if group["section"] == "filter"
        for row in group["rows"]
        if row["provider"].endswith("eps 2^-12")
    ]
    best = min(rows, key=lambda row: row["multiples"]["full"], default=None)
    where = best["shape"]["name"] if best else "trained hidden states"
    multiple = best["multiples"]["full"] if best else None
    by = best["provider"] if best else ""
    return Goal(where, "full, filter 2^-12 / dense GEMMs", "×", multiple, 1.0, by)


def _exactness_goals(results: Mapping[str, Any]) -> Iterator[Goal]:
    """Divide our largest error by what the gate allows; count the forms that repeat their bits.

    The gate allows twice the error of the unfused loss plus 1e-5, errors being relative here.
    """
    rows = _all_rows(results, "logprob")
    unfused = {row["shape"]["name"]: row["error"] for row in rows if row["provider"] == "unfused"}
    errors = [
        (row["error"][name] / (2 * allowed[name] + 1e-5), f"{row['provider']}, {name}")
        for row in rows
        if row["provider"].startswith(OURS) and (allowed := unfused.get(row["shape"]["name"]))
        for name in ERRORS
        if row["error"][name] is not None
    ]
    worst, by = max(errors, default=(None, ""))
    yield Goal("all shapes", "error / gate", "×", worst, 1.0, by)
    same = [r["more"]["same bits"] for r in _all_rows(results, "forms") if "same bits" in r["more"]]
    share = sum(same) / len(same) if same else None
    yield Goal("all shapes", "same bits on two runs", "×", share, 1.0, at_least=True)


def _op_goals(results: Mapping[str, Any]) -> Iterator[Goal]:
    rows = _all_rows(results, "ops")
    for lap in ("forward", "backward"):
        by, row = _best_op(rows, "gather_logprob", lap)
        share = row["share_of_copy"] if row else None
        what = f"{lap} / copy bandwidth"
        yield Goal("gather_logprob", what, "×", share, GATHER_SHARE, by, at_least=True)
    by, row = _best_op(rows, "group_advantage", "forward")
    measured = 1e6 * row["seconds"]["median"] if row else None
    goal = 1e6 * GROUP_ADVANTAGE_S
    yield Goal("group_advantage", "2^20 rows", "µs", measured, goal, by)


def _all_rows(results: Mapping[str, Any], stage: str) -> list[Row]:
    return results.get(stage, {"rows": []})["rows"]


def _rows(results: Mapping[str, Any], stage: str, shape: str) -> list[Row]:
    return [row for row in _all_rows(results, stage) if row["shape"]["name"] == shape]


def _fastest(rows: Iterable[Row], phase: str, *, ours: bool) -> tuple[str, float | None]:
    """Return provider and median seconds of the fastest of ours, or of the peers."""
    medians = {
        row["provider"]: row["times"][phase]["median"]
        for row in rows
        if phase in row["times"]
        and not row["provider"].startswith(BARE_GEMMS)
        and row["provider"].startswith(OURS) == ours
    }
    if not medians:
        return "", None
    best = min(medians, key=medians.__getitem__)
    return best, medians[best]


def _best_op(rows: Iterable[Row], op: str, lap: str) -> tuple[str, Row | None]:
    mine = [row for row in rows if row["op"] == op and row["lap"] == lap]
    best = min(mine, key=lambda row: row["seconds"]["median"], default=None)
    return (best["backend"], best) if best else ("", None)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def table(found: Sequence[Goal]) -> Table:
    """Tabulate goals, with "–" where nothing was measured."""
    table = Table(title="Goals", title_justify="left")
    for heading in ("where", "what"):
        table.add_column(heading, no_wrap=True)
    for heading in ("measured", "goal", "met"):
        table.add_column(heading, justify="right")
    table.add_column("by")
    for goal in found:
        sign = "≥" if goal.at_least else "≤"
        wanted = "–" if goal.goal is None else f"{sign} {goal.goal:.3g} {goal.unit}".rstrip()
        measured = "–" if goal.measured is None else f"{goal.measured:.3g} {goal.unit}".rstrip()
        met = {True: "yes", False: "no", None: "–"}[goal.met]
        table.add_row(goal.where, goal.what, measured, wanted, met, goal.by)
    return table


def tests_figure(counts: Mapping[str, int]) -> str:
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    return f"{passed} passed, {failed} failed, {counts['skipped']} skipped"


def sanitize_figure(result: Mapping[str, Any]) -> str:
    wrong = f", {len(result['failures'])} wrong" if result["failures"] else ""
    return f"{result['cases']} cases over {len(result['launchers'])} launchers{wrong}"


def chip_figure(result: Mapping[str, Any]) -> str:
    copy, gemm = (result[name]["per_second"]["median"] for name in ("copy", "gemm"))
    return f"copy {copy / 1e12:.2f} TB/s, bf16 GEMM {gemm / 1e12:.0f} TFLOP/s"


def logprob_figure(result: Mapping[str, Any]) -> str:
    """Name the fastest of ours and of the peers at the first shape."""
    shape = GPU_SHAPES[0].name
    rows = _rows({"logprob": result}, "logprob", shape)
    parts = [
        f"{by} {1e3 * seconds:.1f} ms"
        for by, seconds in (_fastest(rows, "full", ours=ours) for ours in (True, False))
        if seconds is not None
    ]
    return f"full, {shape}: {', '.join(parts) or 'none could run'}"


def forms_figure(result: Mapping[str, Any]) -> str:
    """Name the fastest of either form at the first shape."""
    shape = GPU_SHAPES[0].name
    rows = _rows({"forms": result}, "forms", shape)
    parts = []
    for form in (THREE_GIB, FROZEN):
        by, seconds = _fastest([r for r in rows if r["provider"].endswith(form)], "full", ours=True)
        if seconds is not None:
            parts.append(f"{by} {1e3 * seconds:.1f} ms")
    return f"full, {shape}: {'; '.join(parts) or 'none could run'}"


def head_figure(result: Mapping[str, Any]) -> str:
    met = sum(check["met"] for check in result["checks"])
    return f"{met} of {len(result['checks'])} aims met"


def ops_figure(result: Mapping[str, Any]) -> str:
    parts = []
    for op, lap in (
        ("gather_logprob", "forward"),
        ("gather_logprob", "backward"),
        ("group_advantage", "forward"),
    ):
        by, row = _best_op(result["rows"], op, lap)
        if row:
            share, micros = 100 * row["share_of_copy"], 1e6 * row["seconds"]["median"]
            parts.append(f"{op} {lap} {micros:.0f} µs, {share:.0f} % of a copy's rate ({by})")
    return "; ".join(parts) or "none could run"
