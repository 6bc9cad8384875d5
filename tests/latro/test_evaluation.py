from __future__ import annotations

import json

import pytest

from latro.evaluate import evaluate
from latro.evaluation import (
    Completion,
    EvaluationSettings,
    answer_logp,
    evaluate_model,
    majority_correct,
)
from latro.rollout import Sample
from latro.scoring import Scorer


@pytest.fixture
def knowing(tiny, tokenizer, task, monkeypatch):
    """A scorer whose model answers as a table says: prompt text to sampled completions."""
    answers: dict[str, list[str]] = {}

    def planted(engine, prompts, *, num_samples, temperature, **options):
        texts = [answers[tokenizer.decode(p)] for p in prompts]
        chosen = [t[1:] if temperature else t[:1] for t in texts]
        assert all(len(c) == num_samples for c in chosen)
        end = tokenizer.eos_token_id
        return [[Sample([*tokenizer.encode(t), end]) for t in c] for c in chosen]

    monkeypatch.setattr("latro.evaluation.TransformersEngine.generate", planted)
    return Scorer(tiny()), answers


def test_accuracies(knowing, tokenizer, task):
    scorer, answers = knowing
    dataset = task.load("test", num_examples=4)
    for row, stated in zip(
        dataset,
        [
            # greedy, then four samples; right is the row's answer, "no" states none.
            ("right", "right", "right", "wrong", "no"),
            ("wrong", "wrong", "right", "wrong", "right"),
            ("no", "no", "no", "no", "right"),
            ("right", "wrong", "wrong", "wrong", "wrong"),
        ],
        strict=True,
    ):
        say = {"right": f" The answer is {row['answer']}", "wrong": " The answer is 1", "no": " so"}
        answers[row["prompt"]] = [say[s] for s in stated]
    settings = EvaluationSettings(num_samples=4, majority=(1, 4), batch_size=3)
    metrics, records = evaluate_model(scorer, tokenizer, task, dataset, settings)
    assert metrics["accuracy_greedy"] == 2 / 4
    assert metrics["accuracy_sampled"] == (2 / 4 + 2 / 4 + 1 / 4 + 0) / 4
    assert metrics["maj@1"] == 1 / 4
    # Two of each in the second problem: the first stated, a wrong one, is taken.
    assert metrics["maj@4"] == 2 / 4
    assert metrics["unfinished"] == 0
    # Four of sixteen samples say anything before their answer or their end.
    assert metrics["rationale_length"] == 4 * len(tokenizer.encode(" so")) / 16
    assert metrics["accuracy_sampled_stderr"] == pytest.approx(0.23936 / 4**0.5, abs=1e-4)
    assert [len(r["sampled"]) for r in records] == [4] * 4
    assert records[0]["sampled"][2] == {
        "text": " The answer is 1",
        "predicted": "1",
        "correct": False,
    }


def test_majority_without_a_statement(task):
    silent = Completion(text="", rollout=None, predicted=None, correct=False)
    assert not majority_correct(task, [silent, silent], {"answer": "5"})


def test_answer_logp_is_the_sum_over_answer_rows(tiny, rollouts):
    scorer = Scorer(tiny())
    sequences = [r for group in rollouts(2, 4) for r in group]
    values = answer_logp(scorer, sequences, token_budget=100)
    for rollout, value in zip(sequences, values, strict=True):
        rows = scorer(scorer.collate([[rollout]])).logp[len(rollout.sampled_ids) :]
        assert value == pytest.approx(rows.sum().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": -1}, "num_samples: expected 0 or more"),
        ({"num_samples": 2, "majority": (4,)}, "k from 1 to num_samples = 2, got 4"),
        ({"majority": (0,)}, "got 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        EvaluationSettings(**settings)


def test_the_command_line(tmp_path, capsys):
    output = tmp_path / "out" / "evaluation.json"
    result = evaluate(
        [
            *("--num_eval_examples", "6", "--num_samples", "2", "--majority", "1", "2"),
            *("--max_completion_length", "8", "--output", str(output), "--save_completions"),
        ]
    )
    assert json.loads(output.read_text()) == result
    assert {"accuracy_greedy", "accuracy_sampled", "maj@1", "maj@2", "answer_logp"} <= set(
        result["metrics"]
    )
    assert len(result["completions"]) == result["problems"] == 6
    assert "maj@2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--num_samples", "2", "--majority", "3"), "k from 1 to num_samples = 2"),
        (("--max_completion_length", "100000"), "lower max_completion_length"),
        (("--eval_split", "tset"), "tset"),
    ],
)
def test_a_bad_call_writes_nothing(tmp_path, argv, message):
    output = tmp_path / "evaluation.json"
    with pytest.raises(ValueError, match=message):
        evaluate(["--output", str(output), *argv])
    assert not output.exists()
