"""Write the study's report, Markdown and a picture, with all numbers taken from the records.

The report includes `discussion.md` beside it, where a person discusses the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from latro.evaluation.metrics import standard_error
from latro.files import replacing
from studies.markdown import listed, paragraphs, table
from studies.real_model.study import (
    LATRO,
    LIMITS,
    MAJORITY,
    METHODS,
    MODEL,
    TARGETS,
    TRAINED_BY_LATRO,
)
from studies.records import Record, Study
from studies.report import commands_section, discussion, effort, write_sections

_PLACE = "{device}, torch {torch}, transformers {transformers}"
PICTURE_FILE = "training.png"
_MAJ = f"maj@{max(MAJORITY)}"
_CURVES = (
    ("mean log π(y|x⊕z), nats", "eval_answer_logp"),
    ("its gain over log π(y|x), nats", "eval_rationale_gain"),
    ("rationale, tokens", "eval_rationale_length"),
)


def write_report(study: Study, folder: Path) -> None:
    """Write README.md and its picture into `folder`.

    Raises:
        ValueError: the study has no finished main cell.
    """
    if not study.part("main"):
        raise ValueError("output_dir: expected a finished main cell in the study, got none")
    sections = [_head(study), _main_section(study), _differences_section(study)]
    # SFT is evaluated in training too, on other problems and without the limit.
    main, trials = (
        [r for r in study.part(part) if "evaluations" in r and r["method"] not in TARGETS]
        for part in ("main", "trial")
    )
    if main:
        _draw(main, folder / PICTURE_FILE)
        sections.append(_training_section([*main, *trials]))
    if study.part("trial"):
        sections.append(_trials_section(study))
    sections += [*discussion(folder), _commands_section(study)]
    write_sections(sections, folder)


def _head(study: Study) -> str:
    threads = sorted({record["environment"]["threads"] for record in study.records})
    plural = "" if threads == [1] else "s"
    how = f", with {' or '.join(map(str, threads))} thread{plural} each,"
    return "\n\n".join(
        (
            f"# LaTRO on {MODEL}",
            paragraphs(
                f"""
                {effort(study, _PLACE, how)} The command, which goes on where it was
                interrupted (`--data_dir` names the raw files), and the one that writes this page
                again from cells.json:
                """
            ),
            f"    {study.command}\n"
            "    python -m studies.real_model --report_only true "
            "--output_dir benchmarks/results/real_model",
            paragraphs(
                """
                Weights are fp32, dequantised from 4 bits. Problems are of the test split; trials
                of settings are judged on others. ± is one standard error over problems, brackets
                hold 95 % intervals (Wilson's). Of a cell with several seeds each is a row.
                """
            ),
        )
    )


def _main_section(study: Study) -> str:
    header = (
        *("task", "method", "seed", "problems", "greedy", _MAJ, "sampled"),
        *("log π(y∣x⊕z), z sampled", "z greedy", "log π(y∣x)", "gain", "rationale, tokens"),
        "unfinished",
    )
    rows = [
        (record["task"], METHODS[record["method"]], str(record["seed"]), *_row(record))
        for record in _in_order(study)
    ]
    return f"## The main table\n\n{table(header, rows, left=2)}"


def _row(record: Record) -> list[str]:
    metrics, of = record["metrics"], record["likelihood"]["summary"]
    low, high = record["intervals"]["accuracy_greedy"]
    return [
        str(record["problems"]),
        f"{metrics['accuracy_greedy']:.1%} [{100 * low:.1f}, {100 * high:.1f}]",
        f"{metrics[_MAJ]:.1%}",
        f"{metrics['accuracy_sampled']:.1%}",
        f"{metrics['answer_logp']:.2f}",
        _with_error(of["greedy"]["sequence"]),
        _with_error(of["none"]["sequence"]),
        _with_error(of["greedy"]["sequence_gain"]),
        f"{metrics['rationale_length']:.0f}",
        f"{metrics['unfinished']:.0%}",
    ]


def _differences_section(study: Study) -> str:
    """Compare what LaTRO trained with every other method, problem by problem."""
    header = ("task", "seed", "", "against", "log π(y∣x⊕z), z greedy", "gain over log π(y∣x)")
    rows = []
    for latro, other in _pairs(study):
        sides = [record["likelihood"]["problems"] for record in (latro, other)]
        logp = [a - b for a, b in zip(sides[0]["greedy"], sides[1]["greedy"], strict=True)]
        gains = [
            [z - none for z, none in zip(side["greedy"], side["none"], strict=True)]
            for side in sides
        ]
        gain = [a - b for a, b in zip(*gains, strict=True)]
        rows.append(
            (
                *(latro["task"], str(latro["seed"])),
                *(METHODS[record["method"]] for record in (latro, other)),
                *(_difference(logp), _difference(gain)),
            )
        )
    parts = ["## Is LaTRO above?"]
    if not rows:
        return "\n\n".join((*parts, "No two methods of one task and seed are finished yet."))
    parts += [
        paragraphs(
            """
            Differences in nats on the same test problems, ± the standard error of their mean.
            **Bold**: more than two of these above zero. The first column is what LaTRO maximises,
            with the form of the answer in it; the second takes off what the model knows without a
            rationale, form and all.
            """
        ),
        table(header, rows, left=4),
    ]
    return "\n\n".join(parts)


def _difference(values: Sequence[float]) -> str:
    mean, error = fmean(values), standard_error(values)
    text = f"{mean:+.2f} ± {error:.2f}"
    return f"**{text}**" if mean > 2 * error else text


def _pairs(study: Study) -> Iterator[tuple[Record, Record]]:
    records = list(_in_order(study))
    for latro in (record for record in records if record["method"] in TRAINED_BY_LATRO):
        for other in records:
            same = all(latro[key] == other[key] for key in ("task", "seed", "problems"))
            if same and other["method"] not in TRAINED_BY_LATRO:
                yield latro, other


def _in_order(study: Study) -> Iterator[Record]:
    for task in LIMITS:
        for method in METHODS:
            for record in study.part("main"):
                if (record["task"], record["method"]) == (task, method):
                    yield record


def _training_section(records: Sequence[Record]) -> str:
    header = (
        *("task", "method", "seed", "update", "log π(y∣x⊕z)", "gain", "greedy"),
        *("rationale, tokens", "unfinished"),
    )
    rows = [
        (
            *(record["task"], _with_changes(record), str(record["seed"]), str(at["step"])),
            f"{at['eval_answer_logp']:.2f}",
            f"{at['eval_rationale_gain']:+.2f}",
            f"{at['eval_accuracy_greedy']:.1%}",
            f"{at['eval_rationale_length']:.0f}",
            f"{at['eval_unfinished']:.0%}",
        )
        for record in records
        for at in record["evaluations"]
    ]
    return f"""## While it trains

{paragraphs("Validation problems, which are none of the test table's. The picture has main cells.")}

{table(header, rows, left=2)}

![validation metrics over updates]({PICTURE_FILE})"""


def _draw(records: Sequence[Record], path: Path) -> None:
    """Draw what evaluations in training showed, a line for each cell."""
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (title, metric) in zip(figure.subplots(1, len(_CURVES)), _CURVES, strict=True):
        for record in records:
            at = record["evaluations"]
            label = f"{METHODS[record['method']]}, {record['task']}, {record['seed']}"
            axis.plot([e["step"] for e in at], [e[metric] for e in at], marker=".", label=label)
        axis.set_title(title)
        axis.set_xlabel("update")
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _trials_section(study: Study) -> str:
    header = (
        *("task", "method", "changed", "greedy", _MAJ, "log π(y∣x⊕z), z greedy", "gain"),
        *("rationale, tokens", "unfinished", "KL, last updates"),
    )
    rows = [_trial(record) for record in study.part("trial")]
    return f"""## Trials

{paragraphs("Settings that differ from the main cells'; validation problems, one seed.")}

{table(header, rows, left=3)}"""


def _trial(record: Record) -> tuple[str, ...]:
    metrics, of = record["metrics"], record["likelihood"]["summary"]
    changed: Mapping[str, Any] = record["changed"]
    usual = record["method"] == "latro" and all(LATRO[k] == v for k, v in changed.items())
    what = _changes(record)
    kl = record["training"].get("kl")
    return (
        record["task"],
        METHODS[record["method"]],
        f"{what} (as in main cells)" if usual else what,
        f"{metrics['accuracy_greedy']:.1%}",
        f"{metrics[_MAJ]:.1%}",
        _with_error(of["greedy"]["sequence"]),
        _with_error(of["greedy"]["sequence_gain"]),
        f"{metrics['rationale_length']:.0f}",
        f"{metrics['unfinished']:.0%}",
        "" if kl is None else f"{kl:.2f}",
    )


def _with_changes(record: Record) -> str:
    """Return the method, and what a trial changes of its settings."""
    method = METHODS[record["method"]]
    return f"{method} with {_changes(record)}" if record["changed"] else method


def _changes(record: Record) -> str:
    return listed(f"{name} = {value}" for name, value in record["changed"].items())


def _with_error(figure: Mapping[str, float]) -> str:
    return f"{figure['mean']:.2f} ± {figure['stderr']:.2f}"


def _commands_section(study: Study) -> str:
    """Return one cell of each method with all its commands."""
    first: dict[str, Record] = {}
    for record in _in_order(study):
        first.setdefault(record["method"], record)
    return commands_section((f"{METHODS[m]}, {r['task']}", r) for m, r in first.items())
