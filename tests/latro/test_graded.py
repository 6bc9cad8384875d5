from __future__ import annotations

import math
from fractions import Fraction

import pytest

from latro.graded import (
    accuracies,
    intervals_of,
    majority_correct,
    metrics_of,
    standard_error,
    wilson_interval,
)


def completion(stated, right="r", tokens=3, finished=True, logp=-1.0):
    """One that states an answer, or none for "-"."""
    return {
        "predicted": None if stated == "-" else stated,
        "correct": stated == right,
        "finished": finished,
        "rationale_tokens": tokens,
        "answer_logp": logp,
    }


def record(greedy, sampled=""):
    made = {"greedy": [completion(greedy)]}
    if sampled:
        made["sampled"] = [completion(stated) for stated in sampled]
    return made


@pytest.mark.parametrize(
    ("sampled", "k", "share"),
    [
        ("rrww", 4, 1),  # a tie: the first stated
        ("wwrr", 4, 0),
        ("-wrr-", 5, 1),
        ("----", 4, 0),
        ("rwrw", 1, 0.5),
        ("rrwwwr", 2, 1 / 3),  # rr, ww, wr
        ("rrwwr", 2, 1 / 2),  # rr, ww; the fifth has no block
        ("wrr", 2, 0),  # wr
    ],
)
def test_a_vote_is_taken_in_each_whole_block(sampled, k, share):
    assert accuracies([record("r", sampled)], [k])[f"maj@{k}"] == [pytest.approx(share)]


def test_votes_of_one_are_the_samples():
    records = [record("r", "rwwr"), record("w", "-www"), record("r", "rrrr")]
    metrics = metrics_of(records, [1])
    assert metrics["maj@1"] == metrics["accuracy_sampled"] == pytest.approx(6 / 12)
    assert metrics["accuracy_greedy"] == pytest.approx(2 / 3)


def test_lengths_are_of_the_samples_where_there_are_any():
    made = record("r", "rr")
    made["greedy"] = [completion("r", tokens=9, finished=False, logp=-9.0)]
    made["sampled"][1] = completion("r", tokens=6, finished=False, logp=-2.0)
    metrics = metrics_of([made], [])
    assert metrics["rationale_length"] == 4.5
    assert metrics["unfinished"] == 0.5
    assert metrics["answer_logp"] == -1.5
    del made["sampled"]
    metrics = metrics_of([made], [])
    assert (metrics["rationale_length"], metrics["unfinished"], metrics["answer_logp"]) == (
        9,
        1,
        -9,
    )


def test_a_majority_that_states_nothing_is_wrong():
    assert not majority_correct([completion("-"), completion("-")])


@pytest.mark.parametrize(("right", "n"), [(0, 1), (0, 7), (7, 7), (3, 7), (81, 263)])
def test_the_ends_of_wilsons_interval_are_1_96_standard_errors_away(right, n):
    # By definition: those p at which the observed share is z·√(p(1−p)/n) away.
    low, high = wilson_interval([1] * right + [0] * (n - right))
    z = 1.959963984540054
    for end in (low, high):
        distance = abs(end - Fraction(right, n))
        assert distance == pytest.approx(z * math.sqrt(end * (1 - end) / n), abs=1e-12)
    assert 0 <= low <= right / n <= high <= 1
    assert low < high


def test_intervals_are_wilsons_of_single_completions_and_of_the_mean_of_several():
    records = [record("r", "rwww"), record("w", "rrww"), record("r", "rrrr"), record("w", "wwww")]
    intervals = intervals_of(records, [2, 4])
    assert intervals["accuracy_greedy"] == list(wilson_interval([1, 0, 1, 0]))
    assert intervals["maj@4"] == list(wilson_interval([0, 1, 1, 0]))
    shares = [0.25, 0.5, 1, 0]
    half = 1.959963984540054 * standard_error(shares)
    assert intervals["accuracy_sampled"] == pytest.approx([0.4375 - half, 0.4375 + half])
    # Blocks of two are several votes a problem.
    half = 1.959963984540054 * standard_error([0.5, 0.5, 1, 0])
    assert intervals["maj@2"] == pytest.approx([0.5 - half, 0.5 + half])


def test_an_interval_of_shares_stays_between_0_and_1():
    records = [record("r", "rrrr"), record("r", "rrww")]
    assert intervals_of(records, [])["accuracy_sampled"][1] == 1.0


def test_one_sample_a_problem_is_right_or_wrong():
    records = [record("r", "r"), record("r", "w"), record("r", "w")]
    assert intervals_of(records, [])["accuracy_sampled"] == list(wilson_interval([1, 0, 0]))


def test_the_standard_error_is_of_the_mean():
    assert standard_error([0.5, 0.5, 0.25, 0.0]) == pytest.approx(0.23936 / 2, abs=1e-4)
    assert standard_error([0.3]) == 0
