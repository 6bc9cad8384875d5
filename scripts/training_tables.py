"""Make the tables of training for `readme_tables.py`: runs, updates, TRL's steps, rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.common.report import mib, where
from scripts.tables import markdown
from studies.markdown import percent
from studies.records import estimate
from studies.replicate.study import METHODS
from studies.replicate.summary import Study

_EVALUATED = ["500 held-out problems", "greedy", "sampled", "rationale, tokens"]


def _evaluated(title: str, evaluations: Sequence[dict[str, float]]) -> list[str]:
    """Make the cells of the mean over evaluations: accuracies, and tokens of a rationale."""
    columns = ("eval_accuracy_greedy", "eval_accuracy_sampled", "eval_rationale_length")
    greedy, sampled, length = (
        sum(e[name] for e in evaluations) / len(evaluations) for name in columns
    )
    return [title, f"{greedy:.1%}", f"{sampled:.1%}", f"{length:.1f}"]


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
        markdown(header, rows) + f"\n\n`python benchmarks/default_run.py --seeds {seeds}` on "
        f"{where(result['environment'])}. The first row was measured with the first seed's samples."
    )


def default_run_short(result: dict[str, Any]) -> str:
    """Tabulate the default run before and after, the mean over its seeds."""
    runs = result["runs"]
    rows = [
        _evaluated("the model that ships", [runs[0]["base"]]),
        _evaluated(f"after LaTRO, mean of {len(runs)} seeds", [run["final"] for run in runs]),
    ]
    return markdown(_EVALUATED, rows)


def step(result: dict[str, Any], folder: str = "step") -> str:
    """Tabulate an update, and a whole step where it was timed, one row per contender."""
    contenders = result["rows"]
    rows = [
        [
            *_contender(row, ours=contenders[0]),
            str(len(row["passes"])),
            f"{row['tokens']:,}",
            f"{row['head_rows']:,}",
        ]
        for row in contenders
    ]
    titles = {"update": "update, s", "step": "whole step, s"}
    header = ["", *(titles[phase] for phase in contenders[0]["times"])]
    header += ["peak of the update, MiB", "forwards", "tokens through trunks", "rows through heads"]
    setting = contenders[0]["setting"]
    low, high = setting["rationale"]
    reps = min(time["reps"] for row in contenders for time in row["times"].values())
    errors = [row["gradient_error"] for row in contenders]
    worst = max(error for error in errors if error is not None)
    model = setting["model"]
    model = (
        f"the weights of `{model}` in float32"
        if isinstance(model, str)
        else f"a Llama of {model['layers']} layers and H = {model['hidden']} in {model['dtype']}"
    )
    return (
        markdown(header, rows)
        + f"\n\nG = {setting['G']} prompt of P = {setting['P']} tokens, K = {setting['K']} "
        f"rationales of {low}–{high}, answers of {setting['A']}, V = {setting['V']}, {model}; "
        f"medians of {reps} interleaved repetitions on {where(result['environment'])}; memory "
        "beyond the weights; the published gradient is ours to within "
        f"{worst:.0e} of each tensor's largest entry. Ranges in "
        f"[the results](benchmarks/results/{folder}/step.json)."
    )


def step_short(result: dict[str, Any]) -> str:
    """Tabulate an update and a whole step, one row per contender, without counts.

    Ours is there once, with its defaults.
    """
    contenders = [row for row in result["rows"] if not row["contender"].startswith("latro (")]
    header = ["", "update, s", "with its rollout, s", "peak of the update, MiB"]
    setting = contenders[0]["setting"]
    low, high = setting["rationale"]
    return (
        markdown(header, [_contender(row, ours=contenders[0]) for row in contenders])
        + f"\n\nK = {setting['K']} rationales of {low}–{high} tokens, V = {setting['V']}, a Llama "
        f"of {setting['model']['layers']} layers with H = {setting['model']['hidden']} on "
        f"{where(result['environment'])}. Ranges and token counts: "
        "[the results](docs/results.md#an-update-and-a-whole-step)."
    )


def _contender(row: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Make the cells of a contender: times of what ours was timed in, and the peak of memory."""
    times = [
        f"{row['times'][phase]['median']:.1f} ({row['ratio'][phase]:.1f} ×)"
        if phase in row["times"]
        else "–"
        for phase in ours["times"]
    ]
    return [row["contender"], *times, f"{mib(row['peak'], 0)} ({row['peak'] / ours['peak']:.1f} ×)"]


def shared_prefix(result: dict[str, Any]) -> str:
    """Tabulate an update of TRL's RLOO with and without shared prefixes, one row a setting."""
    header = ["prompt and completions, tokens", "TRL, s", "`SharedPrefix`"]
    header += ["TRL's tokens through trunks", "shared"]
    rows = [
        [
            "{}, {}–{}".format(row["setting"]["P"], *row["setting"]["rationale"]),
            *_faster(row["trl"], row["shared"]),
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
        f"of {reps} interleaved repetitions on {where(result['environment'])}. Gradients differ by "
        f"at most {error:.0e} of their tensor's largest entry. `SharedPrefix` scores with our "
        "head, whose part of the gain is in the figures. Ranges: "
        "[the results](benchmarks/results/trl/shared_prefix.json)."
    )


def trl_step(result: dict[str, Any]) -> str:
    """Tabulate a step of TRL's trainers with `patch_trl()` off and on, one row a setting."""
    rows = []
    for row in result["rows"]:
        trl, patched = row["peak"]["trl"], row["peak"]["patched"]
        less = "" if None in (trl, patched) else f" ({trl / patched:.1f} × less)"
        rows.append(
            [
                f"{row['trainer']}, V = {row['setting']['V']}, {row['setting']['model']['dtype']}",
                *_faster(row["times"]["trl"], row["times"]["patched"]),
                mib(trl, 0),
                mib(patched, 0) + less,
            ]
        )
    models = {row["setting"]["V"]: row["setting"]["model"] for row in result["rows"]}
    sizes = ", ".join(
        f"{model['layers']} layers and H = {model['hidden']} at V = {V}"
        for V, model in models.items()
    )
    setting = result["rows"][0]["setting"]
    low, high = setting["rationale"]
    reps = min(time["reps"] for row in result["rows"] for time in row["times"].values())
    errors: dict[str, float] = {}
    for row in result["rows"]:
        dtype = row["setting"]["model"]["dtype"]
        errors[dtype] = max(errors.get(dtype, 0.0), row["gradient_error"])
    differ = " and ".join(f"{error:.0e} ({dtype})" for dtype, error in errors.items())
    header = ["", "TRL, s", "patched, s", "TRL, peak MiB", "patched, peak MiB"]
    return (
        markdown(header, rows)
        + f"\n\n{setting['G'] * setting['K']} sequences of {setting['P']} tokens and {low}–{high} "
        f"more; RLOO with its reference, completions given; Llamas of {sizes}; medians of {reps} "
        f"interleaved repetitions on {where(result['environment'])}; memory beyond the weights, "
        f"gradients included. Gradients differ by at most {differ} of their tensor's largest "
        "entry. Ranges: [the results](benchmarks/results/trl/step.json)."
    )


def _faster(before: dict[str, float], after: dict[str, float]) -> tuple[str, str]:
    """Make the cells of two medians in seconds, the second with how much faster it is."""
    slow, fast = before["median"], after["median"]
    return f"{slow:.2f}", f"{fast:.2f} ({slow / fast:.1f} × faster)"


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
    environment = result["environment"]
    versions = [
        f"{name} {environment[name]}" for name in ("transformers", "vllm") if name in environment
    ]
    return (
        markdown(header, rows)
        + f"\n\n{setting['G']} × {setting['K']} completions {lengths} after prompts of "
        f"{setting['P']}, V = {setting['V']}; {result['weights']} weights; medians of {reps} "
        f"interleaved repetitions on {where(environment)}, {', '.join(versions)}."
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
    environment = study.records[0]["environment"]
    return (
        markdown(header, rows)
        + f"\n\n{len(seeds)} seeds, {problems} test problems; `{study.command}` on "
        f"{environment['device']}, one thread per process, torch {environment['torch']}."
    )
