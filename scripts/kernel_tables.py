"""Make the tables of the kernels for `readme_tables.py`: the LM head, the other ops, GPUs."""

from __future__ import annotations

from typing import Any

from benchmarks.common.report import mib, where
from scripts.tables import markdown


def peers_short(result: dict[str, Any]) -> str:
    """Tabulate forward and backward of every provider, a row each, fp32 beside bf16."""
    groups = {g["dtype"]: g["rows"] for g in result["groups"] if g["section"] == "peers"}
    header = [""]
    cells: dict[str, list[str]] = {}
    for dtype, rows in groups.items():
        header += [f"{dtype}, × 3 GEMMs", "extra MiB"]
        for row in rows:
            of_provider = cells.setdefault(row["provider"], [row["provider"]])
            of_provider += [f"{row['multiples']['full']:.2f}", mib(row["memory"]["full"], 0)]
    shape = groups["fp32"][0]["shape"]
    return (
        markdown(header, cells.values())
        + f"\n\nN = {shape['n']}, H = {shape['h']}, V = {shape['v']}. Ours keep all products, "
        "64 MiB of them (the default on a CPU) or none for the backward. Errors and ranges: "
        "[the results](docs/results.md#the-lm-head-beside-other-libraries)."
    )


def peers(result: dict[str, Any]) -> str:
    """Tabulate every provider, fp32 and bf16."""
    groups = [group for group in result["groups"] if group["section"] == "peers"]
    tables = []
    for group in groups:
        rows = [
            [
                row["provider"],
                f"{row['multiples']['forward']:.2f}",
                f"{row['multiples']['full']:.2f}",
                mib(row["memory"]["full"], 0),
                *(_error(row["error"][name]) for name in ("logp", "dx_peaked", "dw")),
            ]
            for row in group["rows"]
        ]
        header = [group["dtype"], "forward, × GEMM", "full, × 3 GEMMs", "extra memory, MiB"]
        header += ["error logp", "error dX, peaked rows", "error dW"]
        tables.append(markdown(header, rows))
    reps = [row["times"]["full"]["reps"] for group in groups for row in group["rows"]]
    shape = groups[0]["rows"][0]["shape"]
    missing = dict.fromkeys(note for group in groups for note in group["notes"])
    return (
        "\n\n".join(tables)
        + f"\n\nN = {shape['n']}, H = {shape['h']}, V = {shape['v']}; medians of {min(reps)} or "
        f"more interleaved repetitions on {where(groups[0]['environment'])}; ranges in "
        "[the results](benchmarks/results/head/study_head.csv).\n"
        + "".join(f"\n- {note}" for note in missing)
    )


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.0e}"


_HEAD_COLUMNS = {
    ("forward", "latro-cpu"): "forward, × GEMM",
    ("full", "latro-cpu-keep"): "full, all products kept, × 3 GEMMs",
    ("full", "latro-cpu-64mib"): "64 MiB kept",
    ("full", "latro-cpu-recompute"): "none kept",
    ("frozen", "latro-cpu"): "full, frozen head, × 2 GEMMs",
}
_FILTER = "eps 2^-12"


def head_study(result: dict[str, Any]) -> str:
    """Tabulate ours by shape, dtype and form, over the bare products; tell filter and slopes."""
    cells: dict[tuple[str, int, int], dict[tuple[str, str], str]] = {}
    widths = set()
    for group in result["groups"]:
        for row in group["rows"]:
            column = group["section"], row["provider"]
            if column in _HEAD_COLUMNS:
                shape = row["shape"]
                widths.add(shape["h"])
                (value,) = row["multiples"].values()
                of_shape = cells.setdefault((group["dtype"], shape["n"], shape["v"]), {})
                of_shape[column] = f"{value:.2f}"
    rows = [
        [f"{n} × {v}, {dtype}", *(found.get(column, "–") for column in _HEAD_COLUMNS)]
        for (dtype, n, v), found in sorted(cells.items(), key=lambda of: of[0][0], reverse=True)
    ]
    (H,) = widths
    filtered = [
        f"in {group['dtype']} {row['multiples']['full']:.2f} × the three products with "
        f"{row['more']['skipped %']:.0f} % of the blocks left out, where without filter it is "
        f"{group['rows'][1]['multiples']['full']:.2f}, no entry of dX off by more than "
        f"{row['error']['dx']:.1%} of the largest"
        for group in result["groups"]
        for row in group["rows"]
        if group["section"] == "filter" and row["provider"].endswith(_FILTER)
    ]
    slopes = "; ".join(
        f"{axis[0]} ({axis.split()[-1]}): "
        + ", ".join(
            f"{slope:.2f} {name.removeprefix('latro-cpu-')}"
            for name, slope in of.items()
            if name.startswith("latro-")
        )
        for axis, of in result["slopes"].items()
    )
    return (
        markdown(["N × V", *_HEAD_COLUMNS.values()], rows)
        + f"\n\nH = {H}; `latro-cpu` on {where(result['groups'][0]['environment'])}; medians; "
        "ranges, memory and errors in [the results](benchmarks/results/head/study_head.csv)."
        "\n\nWith `grad_filter=2**-12` on the states of a small model trained in the study, full "
        f"is {'; '.join(filtered)}."
        f"\n\nSlope of log time of full over log size, 1 where cost is linear: {slopes}."
    )


def ops(result: dict[str, Any]) -> str:
    """Tabulate the other ops beside plain PyTorch, one row per lap."""
    ms: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in result["rows"]:
        ms.setdefault((row["op"], row["dtype"], row["lap"]), {})[row["way"]] = 1e3 * row["median"]
    ways = ("latro", "latro, in place", "plain")
    rows = [
        [f"`{op}` {lap}, {dtype}", *(f"{of[way]:.1f}" if way in of else "" for way in ways)]
        for (op, dtype, lap), of in ms.items()
    ]
    sizes = result["sizes"]
    header = ["median ms", "ours", "over the logits", "plain PyTorch"]
    return (
        markdown(header, rows)
        + f"\n\nN = {sizes['N']}, H = {sizes['H']}, V = {sizes['V']}, {sizes['rows']} rows of "
        f"group_advantage; {where(result['environment'])}; ranges and errors in "
        "[the results](benchmarks/results/ops/ops.json)."
    )


_SAMPLERS = {
    "latro": "`linear_sample`",
    "multinomial": "softmax, multinomial",
    "generate": "transformers' `generate`",
    "cumulative": "cumulative sum, search",
}


def sample(result: dict[str, Any]) -> str:
    """Tabulate what a token costs at the head: ms, and multiples of the time to read the weight."""
    cases: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        case = tuple(row[name] for name in ("dtype", "H", "V", "N"))
        cases.setdefault(case, {})[row["provider"]] = row
    rows = []
    for (dtype, H, V, N), of in cases.items():
        times = [
            f"{1e3 * of[name]['median']:.1f} ({of[name]['multiple']:.1f} ×)" for name in _SAMPLERS
        ]
        memory = (mib(of[name]["extra_bytes"], 0) for name in ("latro", "generate"))
        read = f"{1e3 * of['read']['median']:.1f}"
        rows.append([f"{V} × {H}, {dtype}, N = {N}", read, *times, " / ".join(memory)])
    header = ["V × H", "read the weight, ms", *(f"{name}, ms" for name in _SAMPLERS.values())]
    header.append("extra MiB, ours / `generate`")
    low, high = (choose(row["reps"] for row in result["rows"]) for choose in (min, max))
    return (
        markdown(header, rows)
        + f"\n\nMedians of {low if low == high else f'{low} to {high}'} interleaved repetitions on "
        f"{where(result['environment'])}, and multiples of the time to read the weight; "
        "`linear_sample` gives log-probs and entropies too. Ranges in "
        "[the results](benchmarks/results/linear_sample/linear_sample.json)."
    )


def predicted(result: dict[str, Any]) -> str:
    """Tabulate what the model of GPUs predicts, one row per form, one column per chip."""
    from benchmarks.gpu import model  # of all tables the only one that needs Triton

    shape = model.GPU_SHAPES[0]
    chips = model.CHIPS.values()
    columns = [
        dict(model.predict(chip, shape, model.counts(chip, result)))
        | {f"`{op}` {lap}": time for (op, lap), time in model.predict_ops(chip).items()}
        for chip in chips
    ]
    rows = [
        [name, *(f"{1e3 * of[name].whole:.3g}" if name in of else "–" for of in columns)]
        for name in columns[0]
    ]
    return (
        markdown(["predicted, not measured: ms", *(chip.name for chip in chips)], rows)
        + f"\n\nbf16, N = {shape.n}, H = {shape.h}, V = {shape.v}, 2²⁰ rows of group_advantage. "
        f"Instructions of kernels that Triton {result['triton']} compiled are in "
        "[the counts](benchmarks/results/gpu/compiled.json)."
    )
