"""Compute metrics of graded completions: accuracies with intervals, majority votes, lengths.

Everything is computed from the records of problems, which `latro.evaluation.accuracy` writes one
per line, so an interrupted evaluation gives the same bits as one that was not interrupted.

Intervals are Wilson's 95 % intervals over problems. With one completion or vote per problem, their
sample size n is the number of problems. With several, it is n_eff = p(1−p)/se², the number of
independent outcomes for which a mean p has the standard error se that is found over problems. n_eff
is kept between the number of problems (for a model that is always right or always wrong) and the
number of completions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# The normal distribution's quantile at 0.975.
_Z = 1.959963984540054


def accuracies(
    records: Sequence[Mapping[str, Any]], majority: Sequence[int]
) -> dict[str, list[float]]:
    """Return each problem's share of right completions or votes: 0 or 1 where it has only one.

    Args:
        records: the records of all problems, at least one.
        majority: the k of maj@k, each at most the number of samples.

    Returns:
        By metric: `accuracy_greedy`, and with samples `accuracy_sampled` and `maj@k`. The votes of
        maj@k are over the ⌊n/k⌋ disjoint blocks of k successive samples among n: few samples are
        wasted, and each vote is one that k samples would have given. maj@1 is `accuracy_sampled`.
    """
    shares = {"accuracy_greedy": [mean(_right(record["greedy"])) for record in records]}
    if "sampled" in records[0]:
        shares["accuracy_sampled"] = [mean(_right(record["sampled"])) for record in records]
        for k in majority:
            shares[f"maj@{k}"] = [_majority_share(record["sampled"], k) for record in records]
    return shares


def metrics_of(records: Sequence[Mapping[str, Any]], majority: Sequence[int]) -> dict[str, float]:
    """Return the metrics that `evaluate_model` lists; the arguments are those of `accuracies`."""
    metrics = {}
    for name, shares in accuracies(records, majority).items():
        metrics[name] = mean(shares)
        if name == "accuracy_sampled":
            metrics["accuracy_sampled_stderr"] = standard_error(shares)
    last = "sampled" if "sampled" in records[0] else "greedy"
    completions = [completion for record in records for completion in record[last]]
    metrics["rationale_length"] = mean(c["rationale_tokens"] for c in completions)
    metrics["unfinished"] = mean(not c["finished"] for c in completions)
    metrics["answer_logp"] = mean(c["answer_logp"] for c in completions)
    if "plain_answer_logp" in records[0]:
        metrics["rationale_gain"] = mean(
            c["answer_logp"] - record["plain_answer_logp"]
            for record in records
            for c in record[last]
        )
    return metrics


def intervals_of(
    records: Sequence[Mapping[str, Any]], majority: Sequence[int]
) -> dict[str, list[float]]:
    """Return [low, high] of each accuracy's 95 % interval; the arguments are `accuracies`'."""
    num_samples = len(records[0].get("sampled", ()))
    each = {"accuracy_greedy": 1, "accuracy_sampled": num_samples}
    each |= {f"maj@{k}": num_samples // k for k in majority}
    return {
        name: list(wilson_interval(mean(shares), effective_size(shares, each[name])))
        for name, shares in accuracies(records, majority).items()
    }


def majority_correct(completions: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the most frequent answer is right; on a tie, the first stated one counts."""
    grades = {c["predicted"]: c["correct"] for c in completions if c["predicted"] is not None}
    votes = Counter(c["predicted"] for c in completions if c["predicted"] is not None)
    return bool(votes) and grades[votes.most_common(1)[0][0]]


def wilson_interval(p: float, n: float) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a probability, given a share p of n outcomes."""
    middle = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    # An end that is exactly 0 or 1 would be slightly off by rounding.
    return (0.0 if p == 0 else middle - half, 1.0 if p == 1 else middle + half)


def effective_size(shares: Sequence[float], each: int) -> float:
    """Return how many independent outcomes the shares are worth; each is over `each` outcomes."""
    p, error = mean(shares), standard_error(shares)
    if error == 0:
        return len(shares) * (1 if p in (0, 1) else each)
    return min(max(p * (1 - p) / error**2, len(shares)), len(shares) * each)


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    center = mean(values)
    return math.sqrt(math.fsum((v - center) ** 2 for v in values) / (len(values) - 1) / len(values))


def _majority_share(completions: Sequence[Mapping[str, Any]], k: int) -> float:
    starts = range(0, len(completions) - k + 1, k)
    return mean(majority_correct(completions[i : i + k]) for i in starts)


def _right(completions: Sequence[Mapping[str, Any]]) -> list[bool]:
    return [completion["correct"] for completion in completions]


def mean(values: Iterable[float]) -> float:
    """Return the mean; NaN where there are infinities of both signs, which `fsum` refuses.

    What a rationale adds to the log-prob of an answer is such, where the answer is impossible
    behind one rationale, and without any in another problem.
    """
    values = list(values)
    if {math.inf, -math.inf} <= set(values):
        return math.nan
    return math.fsum(values) / len(values)
