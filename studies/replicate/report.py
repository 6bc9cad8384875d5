"""Write the study's report, Markdown and pictures, with all numbers taken from the records.

The report includes `discussion.md` beside it, where a person discusses the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from studies.estimates import Difference, Estimate
from studies.markdown import items, listed, paragraphs, percent, plain, points, table
from studies.records import Record, estimate
from studies.replicate.charts import draw_ablations, draw_main, draw_majority
from studies.replicate.pretrain import SHIPPED
from studies.replicate.study import (
    ABLATIONS,
    LATRO,
    MAJORITY,
    METHODS,
    SFT_LEARNING_RATE,
)
from studies.replicate.summary import Study
from studies.report import commands_section, discussion, effort, write_sections

_PLACE = "{device}, Python {python}, torch {torch}, transformers {transformers}"
_MAJ = f"maj@{max(MAJORITY)}"
_HEADLINES = (("greedy", "accuracy_greedy"), (_MAJ, _MAJ))
_OTHERS = tuple(method for method in METHODS if method != "latro")


def write_report(study: Study, folder: Path) -> None:
    """Write README.md and its pictures into `folder`.

    Raises:
        ValueError: the study has no finished main cell.
    """
    if not study.pairs():
        raise ValueError("output_dir: expected a finished main cell in the study, got none")
    draw_main(study, folder / "main.png")
    draw_majority(study, folder / "majority.png")
    sections = [_head(study), _main_section(study), _gains_section(study), _majority_section(study)]
    if study.part("ablation"):
        draw_ablations(study, folder / "ablations.png")
        sections.append(_ablation_section(study))
    if study.part("tuning"):
        sections.append(_tuning_section(study))
    sections += [*discussion(folder), _limits_section(study), _settings_section(study)]
    write_sections(sections, folder)


def _head(study: Study) -> str:
    jobs = "one at a time" if study.jobs == 1 else f"{study.jobs} at a time"
    seeds = sorted({record["seed"] for record in study.part("main")})
    text = "# The claim in small\n\n" + paragraphs(
        """
        LaTRO (arXiv 2411.04282) against its base model and supervised fine-tuning, as in the
        paper's Table 2, with models of about a million parameters on generated problems; and what
        changes with its settings.
        """,
        f"""
        {effort(study, _PLACE, f" of processes with one thread each, {jobs},")} The command, which
        goes on where it was interrupted, and the one that writes this page again from cells.json:
        """,
    )
    commands = f"""

    {study.command}
    python -m studies.replicate --report_only true --output_dir benchmarks/results/replicate

"""
    return (
        text
        + commands
        + paragraphs(
            f"""
        Main cells have the {"seed" if len(seeds) == 1 else "seeds"} {listed(map(str, seeds))}. A
        seed decides the order of the training problems and all samples, in training and in
        evaluation; base models are pre-trained once. A figure with ± is the mean and the standard
        deviation (by n − 1) over seeds; one without is of one seed. All cells of a task are
        evaluated on the same {study.part("main")[0]["problems"]} problems of its test split. SFT
        makes as many updates as LaTRO, of as many sequences: LaTRO's are K rationales per prompt,
        SFT's are of one prompt each. The model of the last update counts, for all methods.
        """,
        )
    )


def _main_section(study: Study) -> str:
    header = (
        *("model", "task", "method", "greedy", _MAJ, "sampled"),
        *("rationale, tokens", "mean log π(y∣x⊕z)", "seeds"),
    )
    rows = []
    for architecture, task in study.pairs():
        for method, label in METHODS.items():
            records = study.main(architecture, task, method)
            if records:
                rows.append((architecture, task, label, *_row(records), str(len(records))))
    return f"""## The main table

{table(header, rows, left=3)}

![greedy and {_MAJ} accuracy of every method](main.png)"""


def _row(records: Sequence[Record]) -> list[str]:
    metrics = ("accuracy_greedy", _MAJ, "accuracy_sampled")
    return [
        *(percent(estimate(records, metric)) for metric in metrics),
        plain(estimate(records, "rationale_length"), 1),
        plain(estimate(records, "answer_logp"), 2),
    ]


def _gains_section(study: Study) -> str:
    header = ("model", "task", "", *(f"LaTRO − {METHODS[other]}" for other in _OTHERS))
    rows, notes = [], []
    outcomes: dict[str, list[bool]] = {other: [] for other in _OTHERS}
    for architecture, task in study.pairs():
        for label, metric in _HEADLINES:
            row = [architecture, task, label]
            latro = estimate(study.main(architecture, task, "latro"), metric)
            for other in _OTHERS:
                than = estimate(study.main(architecture, task, other), metric)
                if latro is None or than is None:
                    row.append("")
                    continue
                difference = Difference(latro, than)
                row.append(points(difference))
                if difference.above is not None:
                    outcomes[other].append(difference.above)
                    if not difference.above:
                        where = f"{architecture}, {task}, {label}, against {METHODS[other]}"
                        notes.append(f"{where}: {_why_not(difference)}")
            rows.append(row)
    counts = [
        f"{METHODS[other]} in {sum(met)} of {len(met)}" for other, met in outcomes.items() if met
    ]
    parts = [
        "## Does LaTRO gain?",
        paragraphs(
            """
            Differences in points, with the root of the sum of both variances over seeds. **Bold**:
            more than two such deviations above zero.
            """
        ),
        table(header, rows, left=3),
    ]
    if counts:
        text = f"LaTRO is more than two deviations above {listed(counts)} comparisons."
        parts.append(paragraphs(text))
    if notes:
        parts += ["These are not:", items(notes)]
    return "\n\n".join(parts)


def _why_not(difference: Difference) -> str:
    """Return a sentence on a difference that is not two deviations above zero."""
    of, than = percent(difference.of), percent(difference.than)
    said = f"{of} against {than}, {points(difference)} points"
    room = 1 - difference.than.mean
    if difference.below:
        return f"{said}: LaTRO is the lower by more than two deviations."
    if room <= 2 * (difference.deviation or 0.0):
        return f"{said}: the other leaves {100 * room:.1f} points, less than two deviations."
    return f"{said}: within two deviations of no difference."


def _majority_section(study: Study) -> str:
    votes = [f"maj@{k}" for k in MAJORITY]
    header = ("model", "task", "method", "greedy", *votes, f"{_MAJ} ≥ greedy")
    rows, answers = [], []
    for architecture, task in study.pairs():
        for method, label in METHODS.items():
            records = study.main(architecture, task, method)
            greedy, voted = (estimate(records, metric) for _, metric in _HEADLINES)
            if greedy is None or voted is None:
                continue
            verdict = ""
            if method == "latro":
                answers.append(voted.mean >= greedy.mean)
                verdict = "yes" if answers[-1] else "no"
            figures = [percent(estimate(records, metric)) for metric in votes]
            rows.append((architecture, task, label, percent(greedy), *figures, verdict))
    text = f"""
        maj@k is the accuracy of the commonest answer of k samples, a mean over the disjoint blocks
        of k out of {max(MAJORITY)}. The mean of LaTRO's {_MAJ} is at or above that of its greedy
        accuracy in {sum(answers)} of {len(answers)} models and tasks.
        """
    return f"""## Does a vote help?

{paragraphs(text)}

{table(header, rows, left=3)}

![maj@k over k](majority.png)"""


def _ablation_section(study: Study) -> str:
    parts = [
        "## Ablations",
        paragraphs(
            f"""
            LaTRO on {SHIPPED[0]}, {SHIPPED[1]}, with one setting changed at a time. The row of the
            main setting is that of the main table. `max_completion_length` limits training and
            evaluation. The KL is the mean of the last updates, in nats per rationale.
            """
        ),
        f"![greedy and {_MAJ} accuracy over each setting](ablations.png)",
    ]
    for setting in ABLATIONS:
        of = study.ablation(setting)
        if not of:
            continue
        rows = []
        for value in (value for value in ABLATIONS[setting] if value in of):
            records = of[value]
            # Without β there is no reference to measure it against.
            kl = estimate([r for r in records if r["settings"]["beta"]], "kl", "training")
            seconds = Estimate.of([record["seconds"][0] for record in records])
            label = f"{value} (main)" if value == LATRO[setting] else str(value)
            rows.append(
                (label, *_row(records), plain(kl, 2), f"{seconds.mean:.0f}", str(len(records)))
            )
        header = (
            *(f"`{setting}`", "greedy", _MAJ, "sampled", "rationale, tokens"),
            *("mean log π(y∣x⊕z)", "KL", "seconds to train", "seeds"),
        )
        parts.append(f"### `{setting}`\n\n{table(header, rows, left=1)}")
        parts.append(_ablation_note(study, setting))
    return "\n\n".join(filter(None, parts))


def _ablation_note(study: Study, setting: str) -> str:
    """Return which values are more than two deviations from the main one."""
    of = study.ablation(setting)
    said = []
    compared = 0
    for label, metric in _HEADLINES:
        main = estimate(of.get(LATRO[setting], ()), metric)
        for value, records in of.items():
            other = estimate(records, metric)
            if value == LATRO[setting] or main is None or other is None:
                continue
            difference = Difference(other, main)
            compared += difference.above is not None
            if difference.above or difference.below:
                side = "above" if difference.above else "below"
                said.append(f"{value} is {side} in {label} ({points(difference)} points)")
    if not compared:
        return ""
    if not said:
        return "No value is more than two deviations from the main one."
    return f"More than two deviations from the main setting: {'; '.join(said)}."


def _tuning_section(study: Study) -> str:
    targets: dict[str, list[Record]] = {}
    for record in study.part("tuning"):
        targets.setdefault(record["method"], []).append(record)
    rows, best = [], []
    for method, records in targets.items():
        ordered = sorted(records, key=lambda record: record["changed"]["learning_rate"])
        for record in ordered:
            rate = record["changed"]["learning_rate"]
            rows.append((METHODS[method], f"{rate:g}", *_row([record])))
        top = max(ordered, key=lambda record: [record["metrics"][name] for _, name in _HEADLINES])
        best.append(f"{top['changed']['learning_rate']:g} for {METHODS[method]}")
    header = (
        *("method", "learning rate", "greedy", _MAJ, "sampled"),
        *("rationale, tokens", "mean log π(y∣x⊕z)"),
    )
    used = [f"{rate:g} for {METHODS[method]}" for method, rate in SFT_LEARNING_RATE.items()]
    text = f"""
        Chosen on the validation split, never on test: {SHIPPED[0]}, {SHIPPED[1]}, one seed. The
        best greedy accuracy, and {_MAJ} where it ties, is that of {listed(best)}; the main cells
        have {listed(used)}.
        """
    return f"""## The learning rate of SFT

{paragraphs(text)}

{table(header, rows, left=1)}"""


def _limits_section(study: Study) -> str:
    main = study.part("main")
    problems = main[0]["problems"]
    seeds = len({record["seed"] for record in main})
    # A share of half has the largest standard error.
    error = 100 * (0.25 / problems) ** 0.5
    limits = (
        """
        The models have a million parameters and know nothing but these problems; the paper's have
        3 to 8 billion and have read the world. The pre-training text was mixed so that some
        rationales help and some do not, which gives LaTRO something to find. That a model of
        billions of parameters holds such a mixture for a task is what the paper claims, and is
        not tested here.
        """,
        """
        The mixture decides. With a wrong step in every third rationale that has steps, as in
        arithmetic, the Mistral model with four options learnt that a guess pays more, and dropped
        its rationales altogether; the documents of arithmetic_choice have had few wrong steps
        since. So a gain here says that LaTRO finds rationales that are there and reliable enough,
        and nothing about models without any.
        """,
        """
        The worked rationales that SFT learns from are flawless and in the form that pre-training
        used. People's solutions to real problems are neither, so SFT has a better chance here than
        in the paper.
        """,
        """
        What can be read off: whether a reward made of the model's own likelihood raises accuracy,
        the order of methods on the same problems, and the direction in which a setting moves them.
        Sizes of gains, best settings and times do not carry over to models of billions.
        """,
        f"""
        {seeds} {"seed gives no deviation" if seeds == 1 else "seeds give a rough deviation"}: two
        deviations are a rule of thumb here and no test, and of many comparisons some exceed it by
        chance. Base models are pre-trained once; what another pre-training would change is not in
        it.
        """,
        f"""
        All cells of a task share {problems} problems. Another draw of problems would move each
        accuracy by a standard error of up to {error:.1f} points.
        """,
        """
        SFT's learning rates were chosen on validation problems, for the model that ships, in the
        cells above; LaTRO's is that of `python -m latro.train` on the same model, and was not tuned
        in this study. Both serve for the other models and for all ablations unchanged.
        """,
    )
    return f"## What this can say, and what it cannot\n\n{items(limits)}"


def _settings_section(study: Study) -> str:
    """Return one cell of each method with all its settings and commands."""
    architecture, task = study.pairs()[-1]
    return commands_section(
        (f"{label}, {architecture}, {task}", record)
        for method, label in METHODS.items()
        for record in study.main(architecture, task, method)[:1]
    )
