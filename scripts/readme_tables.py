"""Write the tables of the README and of docs/ from the results that stand in the repository.

    python scripts/readme_tables.py            # rewrite the pages
    python scripts/readme_tables.py --check    # exit 1 where one differs

A table stands between `<!-- begin NAME -->` and `<!-- end NAME -->`, on any number of pages.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from studies.markdown import percent, table
from studies.records import CELLS_FILE, estimate
from studies.replicate.study import METHODS
from studies.replicate.summary import Study

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    ROOT / "README.md",
    ROOT / "docs" / "index.md",
    ROOT / "docs" / "integrations.md",
    ROOT / "docs" / "results.md",
)


def _evaluated(title: str, evaluations: Sequence[dict[str, float]]) -> list[str]:
    """Make the cells of the mean over evaluations: accuracies, and tokens of a rationale."""
    columns = ("eval_accuracy_greedy", "eval_accuracy_sampled", "eval_rationale_length")
    greedy, sampled, length = (
        sum(e[name] for e in evaluations) / len(evaluations) for name in columns
    )
    return [title, f"{greedy:.1%}", f"{sampled:.1%}", f"{length:.1f}"]


_EVALUATED = ["500 held-out problems", "greedy", "sampled", "rationale, tokens"]


def default_run(result: dict[str, Any]) -> str:
    """Tabulate the default run before and after, one row per seed."""
    runs = result["runs"]
    base = runs[0]["base"]
    rows = [[*_evaluated("the model that ships", [base]), f"{base['eval_answer_logp']:.2f}", ""]]
    for run in runs:
        cells = _evaluated(f"after LaTRO, seed {run['seed']}", [run["final"]])
        rows.append([*cells, f"{run['final']['eval_answer_logp']:.2f}", f"{run['seconds']:.0f}"])
    header = [*_EVALUATED, "mean log π(y \\| x⊕z)", "seconds in all"]
    seeds = " ".join(str(run["seed"]) for run in runs)
    return (
        markdown(header, rows)
        + f"\n\n`python benchmarks/default_run.py --seeds {seeds}` on {_where(result)}. The first "
        "row was measured with the first seed's samples."
    )


def default_run_short(result: dict[str, Any]) -> str:
    """Tabulate the default run before and after, the mean over its seeds."""
    runs = result["runs"]
    rows = [
        _evaluated("the model that ships", [runs[0]["base"]]),
        _evaluated(f"after LaTRO, mean of {len(runs)} seeds", [run["final"] for run in runs]),
    ]
    return markdown(_EVALUATED, rows)


def peers_short(result: dict[str, Any]) -> str:
    """Tabulate forward and backward of every provider, a row each, fp32 beside bf16."""
    groups = {g["dtype"]: g["rows"] for g in result["groups"] if g["section"] == "peers"}
    cells: dict[str, list[str]] = {}
    for rows in groups.values():
        for row in rows:
            cells.setdefault(row["provider"], []).extend(
                [f"{row['multiples']['full']:.2f}", _mib(row["memory"]["full"])]
            )
    header = [""]
    for dtype in groups:
        header += [f"{dtype}, × 3 GEMMs", "extra MiB"]
    shape = groups["fp32"][0]["shape"]
    return (
        markdown(header, [[provider, *row] for provider, row in cells.items()])
        + f"\n\nN = {shape['n']}, H = {shape['h']}, V = {shape['v']}. Ours keep all products, "
        "64 MiB of them (the default on a CPU) or none for the backward. Errors and ranges: "
        "[the results](docs/results.md#the-lm-head-beside-other-libraries)."
    )


def _contender(row: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """Make the cells of a contender: times of what ours was timed in, and the peak of memory."""
    ours = result["rows"][0]
    ratio = row["peak"] / ours["peak"]
    times = (_time_and_ratio(row, phase) for phase in ours["times"])
    return [row["contender"], *times, f"{_mib(row['peak'])} ({ratio:.1f} ×)"]


def step_short(result: dict[str, Any]) -> str:
    """Tabulate an update and a whole step, one row per contender, without counts."""
    header = ["", "update, s", "with its rollout, s", "peak of the update, MiB"]
    setting = result["rows"][0]["setting"]
    low, high = setting["rationale"]
    return (
        markdown(header, [_contender(row, result) for row in result["rows"]])
        + f"\n\nK = {setting['K']} rationales of {low}–{high} tokens, V = {setting['V']}, a Llama "
        f"of {setting['model']['layers']} layers with H = {setting['model']['hidden']} on "
        f"{_where(result)}. Ranges and token counts: "
        "[the results](docs/results.md#an-update-and-a-whole-step)."
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
                _mib(row["memory"]["full"]),
                _error(row["error"]["logp"]),
                _error(row["error"]["dx_peaked"]),
                _error(row["error"]["dw"]),
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
        f"more interleaved repetitions on {_where(groups[0])}; ranges in "
        "[the results](benchmarks/results/head/study_head.csv).\n"
        + "".join(f"\n- {note}" for note in missing)
    )


_HEAD_COLUMNS = {
    ("forward", ""): "forward, × GEMM",
    ("full", "-keep"): "full, all products kept, × 3 GEMMs",
    ("full", "-64mib"): "64 MiB kept",
    ("full", "-recompute"): "none kept",
    ("frozen", ""): "full, frozen head, × 2 GEMMs",
}
_FILTER = "eps 2^-12"


def head_study(result: dict[str, Any]) -> str:
    """Tabulate ours by shape, dtype and form, over the bare products; tell filter and slopes."""
    cells: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    sizes: dict[str, dict[str, int]] = {}
    for group in result["groups"]:
        for row in group["rows"]:
            for section, end in _HEAD_COLUMNS:
                if (group["section"], row["provider"]) == (section, f"latro-cpu{end}"):
                    (value,) = row["multiples"].values()
                    of_shape = cells.setdefault((group["name"], group["dtype"]), {})
                    of_shape[section, end] = f"{value:.2f}"
                    sizes[group["name"]] = row["shape"]
    rows = [
        [
            f"{sizes[name]['n']} × {sizes[name]['v']}, {dtype}",
            *(found.get(column, "–") for column in _HEAD_COLUMNS),
        ]
        for (name, dtype), found in sorted(cells.items(), key=lambda item: item[0][1], reverse=True)
    ]
    (H,) = {size["h"] for size in sizes.values()}
    lines = [
        markdown(["N × V", *_HEAD_COLUMNS.values()], rows),
        f"H = {H}; `latro-cpu` on {_where(result['groups'][0])}; medians; ranges, memory and "
        "errors in [the results](benchmarks/results/head/study_head.csv).",
    ]
    filtered = [
        f"in {group['dtype']} {row['multiples']['full']:.2f} × the three products with "
        f"{row['more']['skipped %']:.0f} % of the blocks left out, where without filter it is "
        f"{group['rows'][1]['multiples']['full']:.2f}, no entry of dX off by more than "
        f"{row['error']['dx']:.1%} of the largest"
        for group in result["groups"]
        for row in group["rows"]
        if group["section"] == "filter" and row["provider"].endswith(_FILTER)
    ]
    lines.append(
        "With `grad_filter=2**-12` on the states of a small model trained in the study, full is "
        + "; ".join(filtered)
        + "."
    )
    slopes = "; ".join(
        f"{axis[0]} ({axis.split()[-1]}): "
        + ", ".join(
            f"{slope:.2f} {name.removeprefix('latro-cpu-')}"
            for name, slope in of.items()
            if name.startswith("latro-")
        )
        for axis, of in result["slopes"].items()
    )
    lines.append(f"Slope of log time of full over log size, 1 where cost is linear: {slopes}.")
    return "\n\n".join(lines)


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
        f"group_advantage; {_where(result)}; ranges and errors in "
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
        memory = (_mib(of[name]["extra_bytes"]) for name in ("latro", "generate"))
        read = f"{1e3 * of['read']['median']:.1f}"
        rows.append([f"{V} × {H}, {dtype}, N = {N}", read, *times, " / ".join(memory)])
    header = ["V × H", "read the weight, ms", *(f"{name}, ms" for name in _SAMPLERS.values())]
    header.append("extra MiB, ours / `generate`")
    low, high = (choose(row["reps"] for row in result["rows"]) for choose in (min, max))
    return (
        markdown(header, rows)
        + f"\n\nMedians of {low if low == high else f'{low} to {high}'} interleaved repetitions on "
        f"{_where(result)}, and multiples of the time to read the weight; `linear_sample` gives "
        "log-probs and entropies too. Ranges in "
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


def step(result: dict[str, Any], folder: str = "step") -> str:
    """Tabulate an update, and a whole step where it was timed, one row per contender."""
    rows = [
        [
            *_contender(row, result),
            str(len(row["passes"])),
            f"{row['tokens']:,}",
            f"{row['head_rows']:,}",
        ]
        for row in result["rows"]
    ]
    titles = {"update": "update, s", "step": "whole step, s"}
    header = ["", *(titles[phase] for phase in result["rows"][0]["times"])]
    header += ["peak of the update, MiB", "forwards", "tokens through trunks", "rows through heads"]
    setting = result["rows"][0]["setting"]
    low, high = setting["rationale"]
    reps = min(row["times"][phase]["reps"] for row in result["rows"] for phase in row["times"])
    errors = [row["gradient_error"] for row in result["rows"]]
    worst = max(error for error in errors if error is not None)
    return (
        markdown(header, rows)
        + f"\n\nG = {setting['G']} prompt of P = {setting['P']} tokens, K = {setting['K']} "
        f"rationales of {low}–{high}, answers of {setting['A']}, V = {setting['V']}, "
        f"{_model(setting['model'])}; medians of {reps} interleaved repetitions on "
        f"{_where(result)}; memory beyond the weights; the published gradient is ours to within "
        f"{worst:.0e} of each tensor's largest entry. Ranges in "
        f"[the results](benchmarks/results/{folder}/step.json)."
    )


def _model(model: dict[str, Any] | str) -> str:
    if isinstance(model, str):
        return f"the weights of `{model}` in float32"
    return f"a Llama of {model['layers']} layers and H = {model['hidden']} in {model['dtype']}"


def shared_prefix(result: dict[str, Any]) -> str:
    """Tabulate an update of TRL's RLOO with and without shared prefixes, one row a setting."""
    header = ["prompt and completions, tokens", "TRL, s", "`SharedPrefix`"]
    header += ["TRL's tokens through trunks", "shared"]
    rows = [
        [
            "{}, {}–{}".format(row["setting"]["P"], *row["setting"]["rationale"]),
            f"{row['trl']['median']:.2f}",
            f"{row['shared']['median']:.2f} "
            f"({row['trl']['median'] / row['shared']['median']:.1f} × faster)",
            f"{row['trl_tokens']:,}",
            f"{row['shared_tokens']:,}",
        ]
        for row in result["rows"]
    ]
    setting = result["rows"][0]["setting"]
    reps = min(row[way]["reps"] for row in result["rows"] for way in ("trl", "shared"))
    error = max(row["gradient_error"] for row in result["rows"])
    return (
        markdown(header, rows)
        + f"\n\nAn update of one prompt with K = {setting['K']} given completions, scored under "
        f"policy and reference: a Llama of {setting['model']['layers']} layers, H = "
        f"{setting['model']['hidden']}, V = {setting['V']} in {setting['model']['dtype']}; medians "
        f"of {reps} interleaved repetitions on {_where(result)}. Gradients differ by at most "
        f"{error:.0e} of their tensor's largest entry. `SharedPrefix` scores with our "
        "head, whose part of the gain is in the figures. Ranges: "
        "[the results](benchmarks/results/trl/shared_prefix.json)."
    )


def trl_step(result: dict[str, Any]) -> str:
    """Tabulate a step of TRL's trainers with `patch_trl()` off and on, one row a setting."""
    rows = []
    for row in result["rows"]:
        trl, patched = (row["times"][way]["median"] for way in ("trl", "patched"))
        peaks = [row["peak"][way] for way in ("trl", "patched")]
        less = "" if None in peaks else f" ({peaks[0] / peaks[1]:.1f} × less)"
        name = f"{row['trainer']}, V = {row['setting']['V']}, {row['setting']['model']['dtype']}"
        rows.append(
            [
                name,
                f"{trl:.2f}",
                f"{patched:.2f} ({trl / patched:.1f} × faster)",
                _mib(peaks[0]),
                _mib(peaks[1]) + less,
            ]
        )
    models = {row["setting"]["V"]: row["setting"]["model"] for row in result["rows"]}
    sizes = ", ".join(
        f"{model['layers']} layers and H = {model['hidden']} at V = {V}"
        for V, model in models.items()
    )
    setting = result["rows"][0]["setting"]
    low, high = setting["rationale"]
    reps = min(row["times"][way]["reps"] for row in result["rows"] for way in row["times"])
    error = max(row["gradient_error"] for row in result["rows"])
    header = ["", "TRL, s", "patched, s", "TRL, peak MiB", "patched, peak MiB"]
    return (
        markdown(header, rows)
        + f"\n\n{setting['G'] * setting['K']} sequences of {setting['P']} tokens and {low}–{high} "
        f"more; RLOO with its reference, completions given; Llamas of {sizes}; medians of {reps} "
        f"interleaved repetitions on {_where(result)}; memory beyond the weights, gradients "
        f"included. Gradients differ by at most {error:.0e} of their tensor's largest entry. "
        "Ranges: [the results](benchmarks/results/trl/step.json)."
    )


def rollout(result: dict[str, Any]) -> str:
    """Tabulate tokens a second of a workload's rollouts, one row per contender."""
    rows = [
        [
            f"{row['contender']}, {row['dtype']}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['ratio']:.2f}",
            f"{row['times']['median']:.1f} ({row['times']['low']:.1f}–{row['times']['high']:.1f})",
        ]
        for row in result["rows"]
    ]
    header = [result["workload"], "tokens a second", "× transformers, same dtype", "s (range)"]
    setting = result["setting"]
    low, high = setting["rationale"]
    lengths = f"of {high} tokens" if low == high else f"that end between {low} and {high} tokens"
    reps = min(row["times"]["reps"] for row in result["rows"])
    where = result["environment"]
    versions = [f"{name} {where[name]}" for name in ("transformers", "vllm") if name in where]
    return (
        markdown(header, rows)
        + f"\n\n{setting['G']} × {setting['K']} completions {lengths} after prompts of "
        f"{setting['P']}, V = {setting['V']}; {result['weights']} weights; medians of {reps} "
        f"interleaved repetitions on {_where(result)}, {', '.join(versions)}."
    )


def replicate(result: dict[str, Any]) -> str:
    """Tabulate greedy accuracy of the study's methods by model and task, and LaTRO's majority."""
    study = Study.of(result)
    run = {record["method"] for record in study.part("main")}
    methods = {method: title for method, title in METHODS.items() if method in run}
    rows = []
    for architecture, task in study.pairs():
        greedy = [
            percent(estimate(study.main(architecture, task, method), "accuracy_greedy"))
            for method in methods
        ]
        of_eight = percent(estimate(study.main(architecture, task, "latro"), "maj@8"))
        rows.append([f"{architecture}, {task}", *greedy, of_eight])
    header = ["greedy accuracy, mean ± deviation", *methods.values(), "LaTRO, maj@8"]
    seeds = {record["seed"] for record in study.part("main")}
    problems = study.part("main")[0]["problems"]
    where = study.records[0]["environment"]
    return (
        markdown(header, rows)
        + f"\n\n{len(seeds)} seeds, {problems} test problems; `{study.command}` on "
        f"{where['device']}, one thread per process, torch {where['torch']}."
    )


TABLES: dict[str, tuple[Path, Callable[[dict[str, Any]], str]]] = {
    "default-run": (RESULTS / "default_run.json", default_run),
    "default-run-short": (RESULTS / "default_run.json", default_run_short),
    "peers-short": (RESULTS / "head" / "study_head.json", peers_short),
    "step-short": (RESULTS / "step" / "step.json", step_short),
    "peers": (RESULTS / "head" / "study_head.json", peers),
    "ops": (RESULTS / "ops" / "ops.json", ops),
    "sample": (RESULTS / "linear_sample" / "linear_sample.json", sample),
    "predicted": (RESULTS / "gpu" / "compiled.json", predicted),
    "step": (RESULTS / "step" / "step.json", step),
    "step-smollm2": (RESULTS / "step_smollm2" / "step.json", partial(step, folder="step_smollm2")),
    "step-gemma": (RESULTS / "step_gemma" / "step.json", partial(step, folder="step_gemma")),
    "shared-prefix": (RESULTS / "trl" / "shared_prefix.json", shared_prefix),
    "trl-step": (RESULTS / "trl" / "step.json", trl_step),
    "rollout": (RESULTS / "rollout" / "rollout_smollm2.json", rollout),
    "head-study": (RESULTS / "head" / "study_head.json", head_study),
    "replicate": (RESULTS / "replicate" / CELLS_FILE, replicate),
}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is text, the others are numbers."""
    return table(header, rows, left=1)


def fill(text: str, tables: Mapping[str, str], page: str) -> str:
    """Return the `text` of a `page` with each table between its markers.

    Raises:
        ValueError: a table's markers are missing.
    """
    for name, lines in tables.items():
        block = f"<!-- begin {name} -->\n{lines}\n<!-- end {name} -->"
        pattern = rf"<!-- begin {name} -->\n.*?<!-- end {name} -->"
        text, count = re.subn(pattern, lambda _, b=block: b, text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{page}: expected one pair of markers of {name}, got {count}")
    return text


def render(text: str, page: Path) -> str:
    """Return a page with each table that it has made anew.

    Raises:
        ValueError: markers of an unknown table, or not in pairs.
    """
    here = os.path.relpath(ROOT, page.parent)
    tables = {}
    for name in re.findall(r"<!-- (?:begin|end) (.+) -->", text):
        if name not in TABLES:
            raise ValueError(f"{page.name}: expected a table of {', '.join(TABLES)}, got {name!r}")
        result, make = TABLES[name]
        # Links are written as from the repository's root.
        prefix = "](" if here == os.curdir else f"]({here}/"
        tables[name] = make(json.loads(result.read_text())).replace("](", prefix)
    return fill(text, tables, page.name)


def _where(result: dict[str, Any]) -> str:
    where = result["environment"]
    return f"{where['device']}, {where['threads']} threads, torch {where['torch']}"


def _time_and_ratio(row: dict[str, Any], phase: str) -> str:
    time = row["times"].get(phase)
    return "–" if time is None else f"{time['median']:.1f} ({row['ratio'][phase]:.1f} ×)"


def _mib(value: float | None) -> str:
    return "–" if value is None else f"{value / 2**20:.0f}"


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.0e}"


def rewrite(
    pages: Iterable[Path],
    render: Callable[[str, Path], str],
    description: str | None,
    argv: Sequence[str] | None,
) -> None:
    """Run the command that writes tables into `pages`, or with --check looks whether they differ.

    Args:
        pages: the files.
        render: makes a page's text anew.
        description: the docstring of the command's module.
        argv: the command line.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 on a change")
    args = parser.parse_args(argv)
    for page in pages:
        old = page.read_text(encoding="utf-8")
        new = render(old, page)
        if not args.check:
            page.write_text(new, encoding="utf-8")
        elif new != old:
            sys.exit(f"{page.name}: a table is out of date; run {sys.argv[0]}")


def main(argv: Sequence[str] | None = None) -> None:
    """Write the tables of README and docs/, or check them."""
    rewrite(PAGES, render, __doc__, argv)


if __name__ == "__main__":
    main()
