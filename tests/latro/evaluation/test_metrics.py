from __future__ import annotations

import math
from fractions import Fraction

import pytest

from latro.evaluation.metrics import (
    accuracies,
    effective_size,
    intervals_of,
    majority_correct,
    metrics_of,
    standard_error,
    wilson_interval,
)


def completion(stated, right="r", tokens=3, finished=True, logp=-1.0):
    """Return a completion that states an answer, or none for "-"."""
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


def test_what_rationales_are_worth_is_told_where_plain_answers_are_scored():
    first, second = record("r", "rr"), record("w", "ww")
    assert "rationale_gain" not in metrics_of([first, second], [])
    first["sampled"][0]["answer_logp"] = -5.0
    first["plain_answer_logp"], second["plain_answer_logp"] = -4.0, -2.5
    # Gains of −1 and 3, and twice of 1.5.
    assert metrics_of([first, second], [])["rationale_gain"] == 5 / 4
    for made in (first, second):
        del made["sampled"]
        made["greedy"] = [completion("r", logp=-6.0)]
    assert metrics_of([first, second], [])["rationale_gain"] == (-2 - 3.5) / 2


def test_a_majority_that_states_nothing_is_wrong():
    assert not majority_correct([completion("-"), completion("-")])


@pytest.mark.parametrize(("right", "n"), [(0, 1), (0, 7), (7, 7), (3, 7), (81, 263)])
def test_the_ends_of_wilsons_interval_are_1_96_standard_errors_away(right, n):
    # By definition, the ends are those p whose distance to the observed share is z·√(p(1−p)/n).
    low, high = wilson_interval(right / n, n)
    z = 1.959963984540054
    for end in (low, high):
        distance = abs(end - Fraction(right, n))
        assert distance == pytest.approx(z * math.sqrt(end * (1 - end) / n), abs=1e-12)
    assert 0 <= low <= right / n <= high <= 1
    assert low < high


@pytest.mark.parametrize(
    ("shares", "each", "size"),
    [
        ([1, 0, 1, 0], 1, 4),
        ([1, 1, 1], 1, 3),
        # Always right or always wrong: samples of one problem tell nothing about others.
        ([1, 1, 1], 8, 3),
        ([0, 0], 8, 2),
        # A problem's samples agree entirely and count as one, or are as good as independent ones.
        ([1, 0, 1, 0], 8, 4),
        ([0.5, 0.5, 0.5], 8, 24),
        ([0.5, 0.625, 0.5, 0.375], 8, 32),
        # In between, n_eff gives the standard error that was found: p(1−p)/n_eff = se².
        ([0.25, 0.5, 1, 0.25], 8, 0.25 / standard_error([0.25, 0.5, 1, 0.25]) ** 2),
    ],
)
def test_what_several_samples_a_problem_are_worth(shares, each, size):
    assert effective_size(shares, each) == pytest.approx(size)


def test_intervals_know_how_many_votes_a_problem_has():
    records = [record("r", "rwww"), record("w", "rrww"), record("r", "rrrr"), record("w", "wwww")]
    intervals = intervals_of(records, [2, 4])
    assert intervals["accuracy_greedy"] == list(wilson_interval(0.5, 4))
    assert intervals["maj@4"] == list(wilson_interval(0.5, 4))
    shares = {"accuracy_sampled": [0.25, 0.5, 1, 0], "maj@2": [0.5, 0.5, 1, 0]}
    for name, each in (("accuracy_sampled", 4), ("maj@2", 2)):
        size = effective_size(shares[name], each)
        assert 4 < size < 4 * each
        assert intervals[name] == list(wilson_interval(sum(shares[name]) / 4, size))


def test_the_standard_error_is_of_the_mean():
    assert standard_error([0.5, 0.5, 0.25, 0.0]) == pytest.approx(0.23936 / 2, abs=1e-4)
    assert standard_error([0.3]) == 0
