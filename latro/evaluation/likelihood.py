"""Measure how likely right answers are without a rationale, after written and after own ones.

For a problem x with the answer y, a written rationale z* and rationales z of the model itself:

    none       log π(y|x)
    gold       log π(y|x⊕z*)
    greedy     log π(y|x⊕z), with z decoded greedily
    sampled    log π(y|x⊕z), with z sampled

LaTRO assumes that a model's own likelihood tells good rationales from bad ones (arXiv 2411.04282);
this measures it for a model before anything is trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerBase

from latro.config.ranges import at_least
from latro.engines.transformers import TransformersEngine, seed_of
from latro.engines.vllm_sampling import check_length
from latro.evaluation.accuracy import answer_logp, check_temperature
from latro.evaluation.metrics import mean, standard_error
from latro.evaluation.progress import EvaluationBar
from latro.model.scoring import Scorer
from latro.rollout.answer_join import AnswerJoin
from latro.rollout.dataset_rows import check_dataset, check_rationales
from latro.rollout.prompts import encode_prompt
from latro.rollout.sequences import Rollout, RolloutEngine, Sample, decode, eos_token_ids
from latro.tasks import Task

# Each kind of rationale before the answer, and its name in pictures and tables.
KINDS = {
    "none": "none",
    "gold": "written",
    "greedy": "own, greedy",
    "sampled": "own, sampled",
}


@dataclass(frozen=True)
class ProbeSettings:
    """How to probe.

    Attributes:
        num_samples: sampled rationales per problem; 0: only the greedy one.
        max_completion_length: the longest rationale of the model's own, in tokens.
        batch_size: problems per call of the engine and process.
        temperature: the sampling temperature.
        seed: decides the samples.
        token_budget: tokens of one scoring batch.
    """

    num_samples: int = 4
    max_completion_length: int = 500
    batch_size: int = 512
    temperature: float = 1.0
    seed: int = 0
    token_budget: int = 16384

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 0), ("max_completion_length", 1), ("batch_size", 1)):
            at_least(name, getattr(self, name), least)
        check_temperature(self.temperature)


def probe_model(
    scorer: Scorer,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    dataset: Dataset,
    settings: ProbeSettings,
    *,
    engine: RolloutEngine | None = None,
    accelerator: Accelerator | PartialState | None = None,
) -> list[dict[str, Any]]:
    """Score each problem's answer with and without rationales.

    Several processes share the problems, and each returns the records of all.

    Args:
        scorer: computes log-probs with the model.
        tokenizer: the model's tokenizer.
        task: the task; its answer template ends rationales and opens answers.
        dataset: rows of the task, at least one. `gold` is left out where there is no column
            `rationale`, and for rows with an empty rationale.
        settings: number of samples, lengths and so on.
        engine: samples the rationales with the model's weights; None: transformers, here.
        accelerator: knows the processes; None: there is only this one.

    Raises:
        ValueError: the dataset lacks a column, or a row does not fit the model.

    Returns:
        One record per problem: `index`, `prompt` and `answer`, and for each of `KINDS` a list of
        {`rationale`: text, `answer_logp`: log π(y|·) in nats, `answer_tokens`: number of tokens}.
    """
    model = scorer.model
    join = AnswerJoin(tokenizer, task.answer_template, eos_token_ids(model, tokenizer), task.chat)
    longest = check_dataset(
        dataset,
        name="dataset",
        model=model,
        join=join,
        max_completion_length=settings.max_completion_length,
    )
    if "rationale" in dataset.column_names:
        check_rationales(dataset, name="dataset", model=model, join=join)
    engine = engine or TransformersEngine(model, tokenizer)
    check_length(engine, longest.prompt + settings.max_completion_length)
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    batch_size = settings.batch_size * world
    records: list[dict[str, Any]] = []
    with EvaluationBar("probing", total=len(dataset), done=0, shown=rank == 0) as bar:
        for start in range(0, len(dataset), batch_size):
            indices = range(start, min(start + batch_size, len(dataset)))
            # Some processes may have no problem of the last batch.
            own = indices[rank::world]
            groups = _rollouts(
                [(index, dataset[index]) for index in own],
                engine=engine,
                join=join,
                settings=settings,
                bar=bar,
            )
            flat = [r for group in groups for rollouts in group.values() for r in rollouts]
            logps = iter(answer_logp(scorer, flat, settings.token_budget))
            batch = []
            for index, group in zip(own, groups, strict=True):
                row = dataset[index]
                record = {"index": index, "prompt": row["prompt"], "answer": row["answer"]}
                for kind, rollouts in group.items():
                    record[kind] = [
                        {
                            "rationale": decode(tokenizer, rollout.rationale_ids),
                            "answer_logp": next(logps),
                            "answer_tokens": len(rollout.answer_ids),
                        }
                        for rollout in rollouts
                    ]
                batch.append(record)
            if world > 1:
                batch = sorted(gather_object(batch), key=lambda record: record["index"])
            records += batch
            bar.add(len(indices), {})
    return records


def _rollouts(
    problems: Sequence[tuple[int, Mapping[str, Any]]],
    *,
    engine: RolloutEngine,
    join: AnswerJoin,
    settings: ProbeSettings,
    bar: EvaluationBar,
) -> list[dict[str, list[Rollout]]]:
    """Return the answer of each problem (index and row) after each kind of rationale."""
    if not problems:
        return []
    prompts = [encode_prompt(join.tokenizer, row["prompt"], join.frame) for _, row in problems]
    seeds = [seed_of(settings.seed, index) for index, _ in problems]
    own = {}
    for kind, temperature, count in (
        ("greedy", 0.0, 1),
        ("sampled", settings.temperature, settings.num_samples),
    ):
        if count:
            own[kind] = engine.generate(
                prompts,
                num_samples=count,
                max_new_tokens=settings.max_completion_length,
                temperature=temperature,
                seeds=seeds,
                template=join.ending,
                progress=bar.sampling(),
            )
    groups = []
    for place, (prompt, (_, row)) in enumerate(zip(prompts, problems, strict=True)):
        group = {"none": [join(prompt, Sample([]), row["answer"])]}
        if (row.get("rationale") or "").strip():
            group["gold"] = [join.written(prompt, row["rationale"], row["answer"])]
        for kind, samples in own.items():
            group[kind] = [join(prompt, sample, row["answer"]) for sample in samples[place]]
        groups.append(group)
    return groups


def summary(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Summarise the records for each of `KINDS` that they have.

    Returns:
        By kind: `problems`, their number; `sequence` and `token`, the mean log π(y|·) per answer
        and per answer token in nats, each as {`mean`, `stderr`}. Kinds other than "none" also have
        `sequence_gain` and `token_gain`, the differences to "none" on the same problem, and
        `helps`, the share of rationales that make the answer likelier. Several rationales of a
        problem count as their mean, and standard errors are over problems.
    """
    result: dict[str, dict[str, Any]] = {}
    for kind in (k for k in KINDS if any(k in record for record in records)):
        there = [record for record in records if kind in record]
        result[kind] = {"problems": len(there)}
        for unit in ("sequence", "token"):
            result[kind][unit] = _mean_and_error([_values(r, kind, unit) for r in there])
            if kind != "none":
                result[kind][f"{unit}_gain"] = _mean_and_error(
                    [gains(record, kind, unit) for record in there]
                )
        if kind != "none":
            helped = [[gain > 0 for gain in gains(r, kind, "sequence")] for r in there]
            result[kind]["helps"] = mean(map(mean, helped))
    return result


def gains(record: Mapping[str, Any], kind: str, unit: str) -> list[float]:
    """Return what each rationale of a kind adds to log π(y|x), per "sequence" or per "token"."""
    (none,) = _values(record, "none", unit)
    return [value - none for value in _values(record, kind, unit)]


def _values(record: Mapping[str, Any], kind: str, unit: str) -> list[float]:
    return [
        entry["answer_logp"] / (entry["answer_tokens"] if unit == "token" else 1)
        for entry in record[kind]
    ]


def _mean_and_error(values: Sequence[Sequence[float]]) -> dict[str, float]:
    means = [mean(v) for v in values]
    return {"mean": mean(means), "stderr": standard_error(means)}


def draw(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw histograms over problems: log π(y|·) by kind, and what rationales add to log π(y|x)."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    likelihoods, added = {}, {}
    for kind in (k for k in KINDS if any(k in record for record in records)):
        there = [record for record in records if kind in record]
        likelihoods[kind] = [_values(record, kind, "sequence") for record in there]
        if kind != "none":
            added[kind] = [gains(record, kind, "sequence") for record in there]
    left, right = figure.subplots(1, 2)
    _histograms(left, likelihoods)
    left.set_xlabel("log-likelihood of the right answer, nats")
    _histograms(right, added)
    right.set_xlabel("what a rationale adds to it, nats")
    right.axvline(0, color="black", linewidth=0.8)
    return figure


def _histograms(axis: Any, kinds: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """Draw one line per kind over common bins, from the values of all problems' rationales.

    What is infinite has no bin, as with an answer that is impossible.
    """
    # Every problem has the same weight, however many rationales it has.
    weighted = [
        [
            (value, 1 / len(values) / len(problems))
            for values in problems
            for value in values
            if math.isfinite(value)
        ]
        for problems in kinds.values()
    ]
    axis.hist(
        [[value for value, _ in kind] for kind in weighted],
        weights=[[weight for _, weight in kind] for kind in weighted],
        bins=40,
        histtype="step",
        linewidth=1.5,
        color=[f"C{list(KINDS).index(kind)}" for kind in kinds],
        label=[KINDS[kind] for kind in kinds],
    )
    axis.set_ylabel("share of problems")
    axis.grid(alpha=0.3)
    axis.legend(title="rationale")
