"""What graded completions say: accuracies with intervals, majority votes, lengths.

Everything here is made of the records of problems, as `latro.evaluation.accuracy` writes one per
line, so that an evaluation which was interrupted and one which was not give the same bits.

Intervals are Wilson's, of 95 %, over problems. One completion, or vote, per problem makes n
outcomes of n problems. Several are worth more, by how their shares of right ones spread: it takes
n_eff = p(1−p)/se² outcomes for a mean p to have the standard error se that is found over problems.
n_eff is held between the number of problems (all that is known of a model that is always right, or
always wrong) and that of completions.
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
    """The share of right completions, or votes, of each problem: 0 or 1 where it has one.

    Args:
        records: of all problems; at least one.
        majority: the k of maj@k, each at most the number of samples.

    Returns:
        By metric: `accuracy_greedy`, and with samples `accuracy_sampled` and `maj@k`. The votes of
        maj@k are the ⌊n/k⌋ disjoint blocks of k successive samples among n, so that few samples go
        to waste and each vote is one that k samples would have given: maj@1 is `accuracy_sampled`.
    """
    shares = {"accuracy_greedy": [_mean(_right(record["greedy"])) for record in records]}
    if "sampled" in records[0]:
        shares["accuracy_sampled"] = [_mean(_right(record["sampled"])) for record in records]
        for k in majority:
            shares[f"maj@{k}"] = [_majority_share(record["sampled"], k) for record in records]
    return shares


def metrics_of(records: Sequence[Mapping[str, Any]], majority: Sequence[int]) -> dict[str, float]:
    """Return the metrics that `evaluate_model` names; the arguments are those of `accuracies`."""
    metrics = {}
    for name, shares in accuracies(records, majority).items():
        metrics[name] = _mean(shares)
        if name == "accuracy_sampled":
            metrics["accuracy_sampled_stderr"] = standard_error(shares)
    last = "sampled" if "sampled" in records[0] else "greedy"
    completions = [completion for record in records for completion in record[last]]
    metrics["rationale_length"] = _mean(c["rationale_tokens"] for c in completions)
    metrics["unfinished"] = _mean(not c["finished"] for c in completions)
    metrics["answer_logp"] = _mean(c["answer_logp"] for c in completions)
    return metrics


def intervals_of(
    records: Sequence[Mapping[str, Any]], majority: Sequence[int]
) -> dict[str, list[float]]:
    """[low, high] of each accuracy's 95 % interval; arguments as of `accuracies`."""
    num_samples = len(records[0].get("sampled", ()))
    each = {"accuracy_greedy": 1, "accuracy_sampled": num_samples}
    each |= {f"maj@{k}": num_samples // k for k in majority}
    return {
        name: list(wilson_interval(_mean(shares), effective_size(shares, each[name])))
        for name, shares in accuracies(records, majority).items()
    }


def majority_correct(completions: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the commonest stated answer is right; of equally common ones the first stated."""
    grades = {c["predicted"]: c["correct"] for c in completions if c["predicted"] is not None}
    votes = Counter(c["predicted"] for c in completions if c["predicted"] is not None)
    return bool(votes) and grades[votes.most_common(1)[0][0]]


def wilson_interval(p: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a probability, of which a share p was seen in n outcomes."""
    middle = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    # An end that is 0 or 1 in exact arithmetic rounds to a hair beside it.
    return (0.0 if p == 0 else middle - half, 1.0 if p == 1 else middle + half)


def effective_size(shares: Sequence[float], each: int) -> float:
    """How many independent outcomes shares of `each` outcomes a problem are worth."""
    p, error = _mean(shares), standard_error(shares)
    if error == 0:
        return len(shares) * (1 if p in (0, 1) else each)
    return min(max(p * (1 - p) / error**2, len(shares)), len(shares) * each)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; 0 for one value."""
    if len(values) < 2:
        return 0.0
    mean = _mean(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def _majority_share(completions: Sequence[Mapping[str, Any]], k: int) -> float:
    starts = range(0, len(completions) - k + 1, k)
    return _mean(majority_correct(completions[i : i + k]) for i in starts)


def _right(completions: Sequence[Mapping[str, Any]]) -> list[bool]:
    return [completion["correct"] for completion in completions]


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)
