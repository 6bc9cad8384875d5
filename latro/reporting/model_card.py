"""Write the model card, `README.md` in a run's output folder.

It tells what was trained, on what data and how, with the curve, accuracy and a few completions
before and after, and the command that repeats the evaluation. The hub reads its front matter.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from latro.files import replacing
from latro.rollout.prompts import prompt_text
from latro.terminal import shown

CARD_FILE = "README.md"
LONGEST_TEXT = 2000
"""Number of characters of a prompt or completion that a card shows at most."""

Evaluation = Mapping[str, float]
"""A logged evaluation: its "step", and metrics with names that begin with "eval_"."""

METRICS = (
    ("greedy accuracy", "eval_accuracy_greedy", "{:.1%}"),
    ("sampled accuracy", "eval_accuracy_sampled", "{:.1%}"),
    ("standard error of that", "eval_accuracy_sampled_stderr", "{:.1%}"),
    ("rationale length, tokens", "eval_rationale_length", "{:.1f}"),
    ("completions without an end", "eval_unfinished", "{:.1%}"),
    ("mean log π(y given x⊕z), nats", "eval_answer_logp", "{:.2f}"),
    ("its gain over log π(y given x), nats", "eval_rationale_gain", "{:+.2f}"),
)
"""Title, name and format of each metric that a card shows."""

_PACKAGES = ("latro-kernels", "torch", "transformers", "accelerate", "datasets", "peft")


@dataclass(frozen=True)
class Setting:
    """A setting of the run."""

    name: str
    value: Any
    default: Any


@dataclass(frozen=True)
class HeldOut:
    """How a run was evaluated."""

    problems: int
    """Number of problems."""
    split: str
    grader: str
    """Name of the class that grades."""
    max_completion_length: int
    temperature: float
    num_samples: int
    command: str | None = None
    """The command that repeats the evaluation; None where the commands do not know the task."""


@dataclass(frozen=True)
class Run:
    """The facts about a run that its card shows."""

    name: str
    """Name of the model."""
    method: str
    """A key of `METHODS`."""
    task: str
    """Description of the data set."""
    prompts: int
    """Number of training prompts."""
    update: int
    """Number of the update after which the model was saved."""
    base: str = "a model that is not on the hub"
    """Description of the model that training started from."""
    base_model: str | None = None
    """Its hub id; None where it came from a folder or from code."""
    dataset: str | None = None
    """Hub id of the data set; None for other data."""
    settings: Sequence[Setting] = ()
    adapter: str | None = None
    """Description of the adapter; None where the whole model is trained."""
    held_out: HeldOut | None = None
    before: Evaluation | None = None
    """The first evaluation, if there is one."""
    after: Evaluation | None = None
    """The evaluation of the saved model, if there is one."""
    samples_before: Sequence[Mapping[str, Any]] = ()
    """Problems as `latro.reporting.held_out_samples` keeps them."""
    samples_after: Sequence[Mapping[str, Any]] = ()
    picture: str | None = None
    """File name of the curve, if there is one."""
    device: str = "cpu"
    tags: Sequence[str] = ()
    language: str | None = None
    licence: str | None = None


@dataclass(frozen=True)
class Method:
    """A training method and the paper to cite for it."""

    title: str
    sentence: str
    key: str = "chen2024latro"
    paper: str = (
        "Language Models are Hidden Reasoners: Unlocking Latent Reasoning Capabilities via "
        "Self-Rewarding"
    )
    authors: str = "Chen, Haolin and others"
    arxiv: str = "2411.04282"
    year: int = 2024


_SAMPLED = (
    "The model samples rationales for each prompt and is rewarded, without a verifier or a reward "
    "model, by how likely they make the known answer to itself"
)
METHODS: Mapping[str, Method] = {
    "latro": Method("LaTRO", f"{_SAMPLED}: by its log-likelihood."),
    "verifree": Method(
        title="VeriFree",
        sentence=f"{_SAMPLED}: by its probability.",
        key="verifree2025",
        paper="Reinforcing General Reasoning without Verifiers",
        authors="Zhou, Xiangxin and others",
        arxiv="2505.21493",
        year=2025,
    ),
    "jepo": Method(
        title="JEPO",
        sentence=f"{_SAMPLED}: by the bound on its log-likelihood from all rationales of a prompt.",
        key="jepo2025",
        paper="Beyond Verifiable Rewards: Scaling Reinforcement Learning for Language Models to "
        "Unverifiable Data",
        authors="Tang, Yunhao and others",
        arxiv="2503.19618",
        year=2025,
    ),
    "rlpr": Method(
        title="RLPR",
        sentence=f"{_SAMPLED}: by the mean probability of its tokens, less that without one.",
        key="rlpr2025",
        paper="RLPR: Extrapolating RLVR to General Domains without Verifiers",
        authors="Yu, Tianyu and others",
        arxiv="2506.18254",
        year=2025,
    ),
    "sft": Method(
        "LaTRO's answer term",
        "The model samples rationales for each prompt, and the known answer's likelihood after "
        "them is maximised; rationales themselves earn nothing.",
    ),
    "supervised": Method(
        "SFT", "Supervised fine-tuning: the baseline that the paper below compares with."
    ),
}


def write_card(run: Run, folder: str | os.PathLike[str]) -> None:
    """Write the card of `run` into `folder`, whole or not at all."""
    with replacing(Path(folder) / CARD_FILE) as temporary:
        temporary.write_text(str(model_card(run)), encoding="utf-8")


def is_own_card(path: Path) -> bool:
    """Return whether `path` is a card that `write_card` wrote, or does not exist."""
    if not path.exists():
        return True
    try:
        tags = ModelCard.load(path, ignore_metadata_errors=True).data.tags
    except ValueError:
        return False
    return "latro" in (tags or ())


def model_card(run: Run) -> ModelCard:
    """Return the card of `run`."""
    parts = [_summary(run), _results(run), _curve(run), _samples(run)]
    parts += [_evaluation(run), _settings(run), _versions(run), _citation(run)]
    front = _front_matter(run).to_yaml()
    return ModelCard(f"---\n{front}\n---\n\n" + "\n\n".join(filter(None, parts)) + "\n")


def _front_matter(run: Run) -> ModelCardData:
    results = _eval_results(run)
    return ModelCardData(
        base_model=run.base_model,
        datasets=run.dataset and [run.dataset],
        language=run.language,
        license=run.licence,
        library_name="peft" if run.adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["latro", *run.tags],
        # Names the results; without results the hub's library would add an entry by this name.
        model_name=shown(run.name) if results else None,
        eval_results=results,
    )


def _eval_results(run: Run) -> list[EvalResult] | None:
    if run.after is None or run.held_out is None:
        return None
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=shown(run.dataset or run.task),
            dataset_name=shown(run.task),
            dataset_split=shown(run.held_out.split),
            metric_type="accuracy",
            metric_name=title,
            metric_value=round(run.after[key], 4),
        )
        for title, key, _ in METRICS
        if key.startswith("eval_accuracy") and not key.endswith("stderr") and key in run.after
    ]


def _summary(run: Run) -> str:
    method = METHODS[run.method]
    if run.base_model:
        base = f"[{_text(run.base_model)}](https://huggingface.co/{run.base_model})"
    else:
        base = _text(run.base)
    what = f"{_text(run.adapter)} on {base}" if run.adapter else base
    return (
        f"# {_text(run.name)}\n\n{method.title} on {run.prompts:,} prompts of {_text(run.task)}, "
        f"starting from {what}; {run.update:,} updates. {method.sentence}"
    )


def _results(run: Run) -> str | None:
    if run.after is None or run.held_out is None:
        return None
    columns = [run.after]
    if run.before is not None and run.before["step"] != run.after["step"]:
        columns.insert(0, run.before)
    rows = [
        (title, *(form.format(evaluation[key]) for evaluation in columns))
        for title, key, form in METRICS
        if all(key in evaluation for evaluation in columns)
    ]
    head = [f"{run.held_out.problems:,} held-out problems"]
    head += [f"update {int(evaluation['step']):,}" for evaluation in columns]
    return f"## Results\n\n{_table(head, rows)}"


def _curve(run: Run) -> str | None:
    return run.picture and f"![the run, update by update]({run.picture})"


def _samples(run: Run) -> str | None:
    if not run.samples_after:
        return None
    before = {prompt_text(problem["prompt"]): problem for problem in run.samples_before}
    parts = ["## Samples\n\nThe first held-out problems, greedily; nothing is picked."]
    for number, problem in enumerate(run.samples_after, start=1):
        prompt = prompt_text(problem["prompt"])
        parts.append(f"### Problem {number}\n\n{_fenced(prompt)}")
        parts.append(f"The answer: {_code(problem['answer'])}")
        if prompt in before:
            parts.append(_completion("Before", before[prompt]))
        parts.append(_completion("After", problem))
    return "\n\n".join(parts)


def _completion(when: str, problem: Mapping[str, Any]) -> str:
    stated = problem["predicted"]
    verdict = "right" if problem["correct"] else "wrong"
    told = "states no answer" if stated is None else f"states {_code(stated)}, {verdict}"
    return f"{when}, {told}:\n\n{_fenced(problem['text'])}"


def _evaluation(run: Run) -> str | None:
    held_out = run.held_out
    if held_out is None:
        return None
    samples = f"; {held_out.num_samples} sampled at temperature {held_out.temperature:g}"
    text = (
        f"## Evaluation\n\n{held_out.problems:,} problems of the split {_code(held_out.split)}, "
        "each prompted as in training, without examples: one greedy completion"
        f"{samples if held_out.num_samples else ''}, rationales of at most "
        f"{held_out.max_completion_length:,} tokens. The answer that a completion states last is "
        f"compared with the known one by {_code(held_out.grader)}."
    )
    if held_out.command:
        text += f" The same again:\n\n{_fenced(held_out.command)}"
    return text


def _settings(run: Run) -> str | None:
    rows = [
        (
            _code(s.name),
            _code(_value(s.value)),
            "" if s.value == s.default else _code(_value(s.default)),
        )
        for s in run.settings
    ]
    return f"## Settings\n\n{_table(('setting', 'value', 'default, if another'), rows)}"


def _versions(run: Run) -> str:
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    found += [f"Python {platform.python_version()}", _text(run.device)]
    return f"## Versions\n\n{', '.join(found)}."


def _citation(run: Run) -> str:
    method = METHODS[run.method]
    entry = (
        f"@article{{{method.key},\n"
        f"  title   = {{{method.paper}}},\n"
        f"  author  = {{{method.authors}}},\n"
        f"  journal = {{arXiv:{method.arxiv}}},\n"
        f"  year    = {{{method.year}}}\n"
        "}"
    )
    return f"## Citation\n\n{_fenced(entry, 'bibtex')}"


# Markdown that no text can break out of.


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = [":--", *("--:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def _text(text: str) -> str:
    """Return a text in one line, with backslashes before characters that would be markup."""
    return re.sub(r"[\\`*_\[\]<>#|&$~]", r"\\\g<0>", " ".join(shown(text).split()))


def _fenced(text: str, language: str = "text") -> str:
    text = shown(text)
    if len(text) > LONGEST_TEXT:
        text = f"{text[:LONGEST_TEXT]}\n… ({len(text) - LONGEST_TEXT:,} characters more)"
    fence = "`" * max(3, _longest_ticks(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _code(text: str) -> str:
    """Return a text as inline code, which may stand in a table."""
    text = " ".join(shown(text).split()).replace("|", "\\|")
    ticks = "`" * (_longest_ticks(text) + 1)
    space = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return f"{ticks}{space}{text}{space}{ticks}" if text else ""


def _longest_ticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _value(value: Any) -> str:
    return str(getattr(value, "value", value))
