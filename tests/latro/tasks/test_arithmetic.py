import re
from itertools import islice

import pytest

from latro.tasks import get_task
from latro.tasks.arithmetic import GAINS, LOSSES, Problem, generate_problems

TASK = get_task("arithmetic")


def test_a_problem_reads_as_documented():
    problem = Problem(10, (-2, 7), "Tom", "pens", ("loses", "gets"))
    assert problem.prompt == "Tom has 10 pens. Tom loses 2. Tom gets 7. How many?"
    assert problem.answer == "15"
    assert problem.steps() == ["10 - 2 = 8.", "8 + 7 = 15."]


def test_a_slip_is_carried_on_and_never_falls_below_zero():
    problem = Problem(2, (-2, 7), "Tom", "pens", ("loses", "gets"))
    assert problem.steps(slip=(0, 1)) == ["2 - 2 = 1.", "1 + 7 = 8."]
    assert problem.steps(slip=(1, -2)) == ["2 - 2 = 0.", "0 + 7 = 5."]
    assert problem.steps(slip=(0, -1)) == problem.steps()


def test_a_rationale_is_right_at_every_step_and_ends_at_the_answer():
    for row in TASK.load("train", num_examples=200):
        steps = re.findall(r"(\d+) ([+-]) (\d) = (\d+)\.", row["rationale"])
        assert row["rationale"] == " ".join("{} {} {} = {}.".format(*step) for step in steps)
        count = re.search(r"has (\d+)", row["prompt"])[1]
        for before, sign, amount, result in steps:
            assert before == count
            assert int(result) == int(before) + int(sign + amount)
            count = result
        assert len(steps) == len(re.findall(r"(\d)\. ", row["prompt"]))
        assert count == row["answer"]


def test_answers_follow_from_the_words_and_counts_never_fall_below_zero():
    for row in TASK.load("train", num_examples=500):
        count = int(re.search(r"has (\d+)", row["prompt"])[1])
        assert 2 <= count <= 20
        changes = re.findall(r"(\w+) (\d)\.", row["prompt"])
        assert 2 <= len(changes) <= 4
        for verb, amount in changes:
            assert (verb in GAINS) != (verb in LOSSES)
            count += int(amount) if verb in GAINS else -int(amount)
            assert count >= 0
        assert row["answer"] == str(count)
        assert TASK.grade(f" It is so. The answer is {count}", row)
        assert not TASK.grade(f" It is so. The answer is {count + 1}", row)


def numbers(prompts):
    return {
        tuple((verb in LOSSES, amount) for verb, amount in re.findall(r"(\w+) (\d+)", prompt))
        for prompt in prompts
    }


def test_no_held_out_sum_is_in_train_under_any_seed():
    train = numbers(p for seed in range(3) for p in TASK.load("train", seed=seed)["prompt"])
    for split in ("validation", "test"):
        held_out = numbers(TASK.load(split, seed=3)["prompt"])
        assert len(held_out) > 400
        assert not held_out & train


def test_a_split_has_a_fixed_size_without_repeats():
    for split, count in {"train": 10_000, "validation": 500, "test": 500}.items():
        assert len(set(TASK.load(split)["prompt"])) == count
    assert len(TASK.load("test", num_examples=3)) == 3


def test_the_seed_fixes_the_problems():
    first = TASK.load("test", num_examples=20, seed=1)["prompt"]
    assert first == TASK.load("test", num_examples=20, seed=1)["prompt"]
    assert first != TASK.load("test", num_examples=20, seed=2)["prompt"]
    assert first[:5] == [problem.prompt for problem in islice(generate_problems("test", 1), 5)]


def test_a_dataset_path_is_refused(tmp_path):
    with pytest.raises(ValueError, match="takes no dataset_path"):
        TASK.load("train", dataset_path=tmp_path)
