"""What the GPU suite's results say: one line a stage, and every goal with what was measured.

Goals of `linear_logprob` are in milliseconds, multiples of a floor that this GPU's own bf16 GEMM
rate sets: with N rows, hidden size H and vocabulary V a forward has 2·N·H·V operations at least, a
forward and backward 6·N·H·V with a trainable head and 4·N·H·V with a frozen one. Beside each goal
stands the fastest of our providers. A goal whose stage was skipped or failed has no measured value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from benchmarks.common import report
from benchmarks.common.problem import GPU_SHAPES, Shape
from benchmarks.linear_logprob import BARE_GEMMS, ERRORS

OURS = "latro-"
THREE_GIB = "-3gib"
"""End of our providers' names that have a memory budget of 3 GiB."""

FORWARD = 1.2
FULL_3_GIB = 1.2
FULL_512_MIB_MS = {"llama-3.1-8b": 50.0}
"""512 MiB is the default budget. The other shapes have the same multiple of their floors: 50 ms
where the floor is 33."""
FULL_512_MIB = 1.5
FULL_FROZEN = 1.25
GATHER_SHARE = 0.85
GROUP_ADVANTAGE_US = 30.0
OP_LAPS = (
    ("gather_logprob", "bf16", "forward"),
    ("gather_logprob", "bf16", "backward"),
    ("group_advantage", "fp32", "forward"),
)

PUBLISHED = (
    (
        "Liger, its README: H100, N = 8192, V = 131072",
        "llama-3.1-8b",
        {"forward": 12.3, "full": 50.2},
    ),
    (
        "TRL, its issue 7244: V = 151936, in chunks",
        "qwen2.5-7b",
        {BARE_GEMMS: 42.0, "full": 167.0},
    ),
)
"""Milliseconds that others have published, and the shape of ours that is nearest."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Goal:
    """What was measured beside what is wanted; None where there is no number.

    Args:
        where: the shape or op.
        what: is measured.
        unit: of both numbers.
        measured: the number.
        goal: the most that it may be, or the least where `at_least`.
        by: the provider or backend whose number it is.
        at_least: see `goal`.
    """

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
    head, peers, full, frozen = (
        [row for row in rows if row["shape"]["name"] == shape.name]
        for rows in (
            rows_of(results, "head"),
            rows_of(results, "peers"),
            section_of(results, "full"),
            section_of(results, "frozen"),
        )
    )
    rate = results["chip"]["gemm"]["per_second"]["median"] if "chip" in results else None
    unit_ms = None if rate is None else 1e3 * shape.n * shape.h * shape.v / rate

    def floors(multiple: float) -> float | None:
        return None if unit_ms is None else multiple * unit_ms

    budget = [row for row in full if row["provider"].endswith(THREE_GIB)]
    default = FULL_512_MIB_MS.get(shape.name)
    for what, rows, phase, goal in (
        (f"forward: {FORWARD} × floor", head, "forward", floors(2 * FORWARD)),
        (f"full, 3 GiB: {FULL_3_GIB} × floor", budget, "full", floors(6 * FULL_3_GIB)),
        (
            "full, 512 MiB" if default else f"full, 512 MiB: {FULL_512_MIB} × floor",
            head,
            "full",
            default or floors(6 * FULL_512_MIB),
        ),
        (f"full, frozen head: {FULL_FROZEN} × floor", frozen, "full", floors(4 * FULL_FROZEN)),
    ):
        by, measured = _fastest(rows, phase, ours=True)
        yield Goal(shape.name, what, "ms", measured=measured, goal=goal, by=by)
    for phase in ("forward", "full"):
        (by, mine), (peer, theirs) = (_fastest(peers, phase, ours=ours) for ours in (True, False))
        ratio, who = (mine / theirs, f"{by} / {peer}") if mine and theirs else (None, "")
        yield Goal(shape.name, f"{phase} / fastest peer", "×", measured=ratio, goal=1.0, by=who)


def _filter_goal(results: Mapping[str, Any]) -> Goal:
    """Compare the head study's filter on trained hidden states with the three dense products."""
    rows = [r for r in section_of(results, "filter") if r["provider"].endswith("eps 2^-12")]
    best = min(rows, key=lambda row: row["multiples"]["full"], default=None)
    return Goal(
        best["shape"]["name"] if best else "trained hidden states",
        "full, filter 2^-12 / dense GEMMs",
        "×",
        measured=best["multiples"]["full"] if best else None,
        goal=1.0,
        by=best["provider"] if best else "",
    )


def _exactness_goals(results: Mapping[str, Any]) -> Iterator[Goal]:
    """Divide our largest error by what the gate allows; count the forms that repeat their bits.

    The gate allows twice the error of the unfused loss plus 1e-5, errors being relative here.
    """
    rows = rows_of(results, "head")
    unfused = {row["shape"]["name"]: row["error"] for row in rows if row["provider"] == "unfused"}
    errors = [
        (row["error"][name] / (2 * allowed[name] + 1e-5), f"{row['provider']}, {name}")
        for row in rows
        if row["provider"].startswith(OURS) and (allowed := unfused.get(row["shape"]["name"]))
        for name in ERRORS
        if row["error"][name] is not None
    ]
    worst, by = max(errors, default=(None, ""))
    yield Goal("all shapes", "error / gate", "×", measured=worst, goal=1.0, by=by)
    forms = [*rows, *section_of(results, "full"), *section_of(results, "frozen")]
    ours = (row["more"] for row in forms if row["provider"].startswith(OURS))
    same = [more["same bits"] for more in ours if "same bits" in more]
    share = sum(same) / len(same) if same else None
    what = "same bits on two runs"
    yield Goal("all shapes", what, "×", measured=share, goal=1.0, at_least=True)


def _op_goals(results: Mapping[str, Any]) -> Iterator[Goal]:
    for op, dtype, lap in OP_LAPS:
        row = best_op(rows_of(results, "ops"), op, dtype, lap)
        by = row["way"] if row else ""
        if op == "gather_logprob":
            share = _share_of_copy(row) if row else None
            what = f"{lap} / copy bandwidth"
            yield Goal(op, what, "×", share, GATHER_SHARE, by=by, at_least=True)
        else:
            micros = 1e6 * row["median"] if row else None
            yield Goal(op, "2^20 rows", "µs", measured=micros, goal=GROUP_ADVANTAGE_US, by=by)


def rows_of(results: Mapping[str, Any], stage: str) -> list[Row]:
    """Return the rows of a stage, none where it has no results."""
    return results.get(stage, {"rows": []})["rows"]


def section_of(results: Mapping[str, Any], section: str) -> list[Row]:
    """Return the rows of one section of the head study."""
    groups = results.get("forms", {"groups": []})["groups"]
    return [row for group in groups if group["section"] == section for row in group["rows"]]


def _fastest(rows: Iterable[Row], phase: str, *, ours: bool) -> tuple[str, float | None]:
    """Return provider and median milliseconds of the fastest of ours, or of the peers."""
    medians = {
        row["provider"]: 1e3 * row["times"][phase]["median"]
        for row in rows
        if phase in row["times"]
        and row["provider"] != BARE_GEMMS
        and row["provider"].startswith(OURS) == ours
    }
    best = min(medians, key=medians.__getitem__, default="")
    return best, medians.get(best)


def best_op(rows: Iterable[Row], op: str, dtype: str, lap: str) -> Row | None:
    """Return the row of the fastest of our backends, or None."""
    mine = (
        row
        for row in rows
        if (row["op"], row["dtype"], row["lap"]) == (op, dtype, lap) and row["way"].startswith(OURS)
    )
    return min(mine, key=lambda row: row["median"], default=None)


def _share_of_copy(row: Row) -> float:
    return row["bytes_per_second"] / row["copy_bytes_per_second"]


def table(found: Sequence[Goal]) -> Table:
    """Tabulate goals, with "–" where nothing was measured."""
    rows = []
    for goal in found:
        sign = "≥" if goal.at_least else "≤"
        wanted = "–" if goal.goal is None else f"{sign} {goal.goal:.3g} {goal.unit}"
        measured = "–" if goal.measured is None else f"{goal.measured:.3g} {goal.unit}"
        met = {True: "yes", False: "no", None: "–"}[goal.met]
        rows.append((goal.where, goal.what, measured, wanted, met, goal.by))
    headings = ("where", "what", "measured", "goal", "met", "by")
    return report.table("Goals", headings, rows, names=2)


def published_table(results: Mapping[str, Any]) -> Table:
    """Tabulate milliseconds that others have published beside ours at the nearest shape."""
    rows = []
    for who, shape, theirs in PUBLISHED:
        mine = [row for row in rows_of(results, "head") if row["shape"]["name"] == shape]
        bare = next((row for row in mine if row["provider"] == BARE_GEMMS), None)
        for what, milliseconds in theirs.items():
            if what == BARE_GEMMS:
                ours = 1e3 * bare["times"]["full"]["median"] if bare else None
            else:
                _, ours = _fastest(mine, what, ours=True)
            cell = "–" if ours is None else f"{ours:.1f}"
            rows.append((who, what, f"{milliseconds:.1f}", cell, shape))
    headings = ("published", "what", "ms", "ours, ms", "at")
    return report.table("Published elsewhere", headings, rows, names=2)


def sanitize_figure(result: Mapping[str, Any]) -> str:
    """Count the cases and launchers that a sanitizer has watched."""
    wrong = f", {len(result['failures'])} wrong" if result["failures"] else ""
    return f"{result['cases']} cases over {len(result['launchers'])} launchers{wrong}"


def chip_figure(result: Mapping[str, Any]) -> str:
    """Say what the chip can do."""
    copy, gemm = (result[name]["per_second"]["median"] for name in ("copy", "gemm"))
    return f"copy {copy / 1e12:.2f} TB/s, bf16 GEMM {gemm / 1e12:.0f} TFLOP/s"


def logprob_figure(result: Mapping[str, Any]) -> str:
    """Name the fastest of ours and of the peers at the first shape."""
    if not result["rows"]:
        return "none could run"
    shape = result["rows"][0]["shape"]["name"]
    rows = [row for row in result["rows"] if row["shape"]["name"] == shape]
    return f"full, {shape}: {_fastest_of(rows, ours=True)}; {_fastest_of(rows, ours=False)}"


def forms_figure(result: Mapping[str, Any]) -> str:
    """Name the fastest with 3 GiB and with a frozen head, and count the study's aims met."""
    full, frozen = (section_of({"forms": result}, section) for section in ("full", "frozen"))
    budget = [row for row in full if row["provider"].endswith(THREE_GIB)]
    met = sum(check["met"] for check in result["checks"])
    return (
        f"full: {_fastest_of(budget, ours=True)}; frozen: {_fastest_of(frozen, ours=True)}; "
        f"{met} of {len(result['checks'])} aims met"
    )


def _fastest_of(rows: Sequence[Row], *, ours: bool) -> str:
    """Name the fastest of ours or of the peers at the first shape of `rows`."""
    at = [row for row in rows if row["shape"] == rows[0]["shape"]]
    name, milliseconds = _fastest(at, "full", ours=ours)
    return "none" if milliseconds is None else f"{name} {milliseconds:.1f} ms"


def ops_figure(result: Mapping[str, Any]) -> str:
    """Name the fastest of ours of each op."""
    parts = []
    for op, dtype, lap in OP_LAPS:
        if row := best_op(result["rows"], op, dtype, lap):
            micros, share = 1e6 * row["median"], 100 * _share_of_copy(row)
            parts.append(f"{op} {lap} {micros:.0f} µs, {share:.0f} % of a copy's rate")
    return "; ".join(parts) or "none could run"
