from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from datasets import Dataset

from latro.engines.transformers import TransformersEngine
from latro.evaluation import accuracy
from latro.evaluation.accuracy import EvaluationSettings, answer_logp, evaluate_model
from latro.evaluation.likelihood import ProbeSettings, probe_model
from latro.evaluation.resume import Journal
from latro.model.scoring import Scorer
from latro.rollout.answer_join import AnswerJoin
from latro.rollout.prompts import encode_prompt
from latro.rollout.sequences import Sample, decode
from latro.tasks import read_own_data
from tests.latro import frames
from tests.latro.frames import framed


@pytest.fixture
def knowing(tiny, tokenizer, task, monkeypatch):
    """Return a scorer and a table from prompt texts to the completions that its model samples."""
    answers: dict[str, list[str]] = {}

    def planted(engine, prompts, *, num_samples, temperature, **options):
        texts = [answers[tokenizer.decode(p)] for p in prompts]
        chosen = [t[1:] if temperature else t[:1] for t in texts]
        assert all(len(c) == num_samples for c in chosen)
        end = tokenizer.eos_token_id
        return [[Sample([*tokenizer.encode(t), end]) for t in c] for c in chosen]

    monkeypatch.setattr("latro.evaluation.accuracy.TransformersEngine.generate", planted)
    return Scorer(tiny()), answers


def test_each_batch_costs_as_much_as_the_first(knowing, tokenizer, task, monkeypatch):
    """Accuracies so far were counted over all records after each, and all ids were held."""
    scorer, answers = knowing
    dataset = task.load("test", num_examples=5)
    answers |= {row["prompt"]: [" The answer is 1"] * 2 for row in dataset}
    counted, encoded = [], []
    count, encode = accuracy._Accuracies.__call__, accuracy.encode_each
    monkeypatch.setattr(
        accuracy._Accuracies, "__call__", lambda a, r: counted.append(len(r)) or count(a, r)
    )
    monkeypatch.setattr(
        accuracy, "encode_each", lambda rows, join: encoded.append(len(rows)) or encode(rows, join)
    )
    evaluate_model(scorer, tokenizer, task, dataset, EvaluationSettings(batch_size=2))
    assert counted == [0, 2, 2, 1]
    assert encoded == [2, 2, 1]


def test_accuracies(knowing, tokenizer, task):
    scorer, answers = knowing
    dataset = task.load("test", num_examples=4)
    for row, stated in zip(
        dataset,
        [
            # The greedy completion, then four samples; "no" states no answer.
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
    assert metrics["maj@1"] == metrics["accuracy_sampled"]
    # The second problem has a tie, so the first stated answer, a wrong one, counts.
    assert metrics["maj@4"] == 2 / 4
    assert metrics["unfinished"] == 0
    # Four of sixteen samples say anything before their answer or their end.
    assert metrics["rationale_length"] == 4 * len(tokenizer.encode(" so")) / 16
    assert metrics["accuracy_sampled_stderr"] == pytest.approx(0.23936 / 4**0.5, abs=1e-4)
    assert [len(r["sampled"]) for r in records] == [4] * 4
    wrong = records[0]["sampled"][2]
    assert wrong.pop("answer_logp") < 0
    assert wrong == {
        "text": " The answer is 1",
        "predicted": "1",
        "correct": False,
        "finished": True,
        "rationale_tokens": 0,
    }


def test_the_likelihood_is_of_each_completions_own_rationale(knowing, tokenizer, task):
    scorer, answers = knowing
    dataset = task.load("test", num_examples=2)
    texts = [" so. The answer is 3", " Tom so", ""]
    answers.update({row["prompt"]: texts for row in dataset})
    settings = EvaluationSettings(num_samples=2)
    metrics, records = evaluate_model(scorer, tokenizer, task, dataset, settings)
    end = tokenizer.eos_token_id
    join = AnswerJoin(tokenizer, task.answer_template, [end])
    for row, record in zip(dataset, records, strict=True):
        rollouts = [
            join(
                encode_prompt(tokenizer, row["prompt"]),
                Sample([*tokenizer.encode(text), end]),
                row["answer"],
            )
            for text in texts
        ]
        found = [c["answer_logp"] for c in record["greedy"] + record["sampled"]]
        assert found == pytest.approx(answer_logp(scorer, rollouts, 1000), rel=1e-5)
        assert len(set(found)) == 3
    sampled = [c["answer_logp"] for record in records for c in record["sampled"]]
    assert metrics["answer_logp"] == pytest.approx(sum(sampled) / 4)


def test_the_gain_of_a_rationale_is_over_the_answer_after_the_prompt_alone(
    knowing, tokenizer, task
):
    scorer, answers = knowing
    dataset = task.load("test", num_examples=3)
    answers.update({row["prompt"]: [" so", " so. The answer is 3", " Tom"] for row in dataset})
    settings = EvaluationSettings(num_samples=2, batch_size=2)
    metrics, records = evaluate_model(scorer, tokenizer, task, dataset, settings)
    asked = replace(settings, rationale_gain=True)
    more, gains = evaluate_model(scorer, tokenizer, task, dataset, asked)
    worth = more.pop("rationale_gain")
    assert more == metrics
    by_hand, told = [], []
    for row, record in zip(dataset, gains, strict=True):
        prompt = encode_prompt(tokenizer, row["prompt"])
        answer = [*tokenizer.encode(f" The answer is {row['answer']}"), tokenizer.eos_token_id]
        with torch.no_grad():
            logits = scorer.model(input_ids=torch.tensor([prompt + answer])).logits[0]
        rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        plain = sum(r[token].item() for r, token in zip(rows, answer, strict=True))
        told.append(record.pop("plain_answer_logp"))
        assert told[-1] == pytest.approx(plain, rel=1e-5)
        by_hand += [c["answer_logp"] - plain for c in record["sampled"]]
    assert gains == records
    assert worth == pytest.approx(sum(by_hand) / 6, abs=1e-4)
    probed = probe_model(scorer, tokenizer, task, dataset, ProbeSettings(num_samples=0))
    assert told == pytest.approx([r["none"][0]["answer_logp"] for r in probed], rel=1e-5)


def test_batches_of_any_size_give_the_same_result(tiny, tokenizer, task):
    dataset = task.load("test", num_examples=5)

    def run(batch_size):
        settings = EvaluationSettings(num_samples=2, max_completion_length=5, batch_size=batch_size)
        return evaluate_model(Scorer(tiny()), tokenizer, task, dataset, settings)

    (metrics, records), (others, other_records) = run(5), run(2)
    assert others == pytest.approx(metrics, rel=1e-5)
    texts = [[c["text"] for c in r["greedy"] + r["sampled"]] for r in records]
    assert [[c["text"] for c in r["greedy"] + r["sampled"]] for r in other_records] == texts


@pytest.mark.parametrize(("words", "more"), [(1, 32), (100, 100)])
def test_the_longest_answer_has_room_behind_a_rationale(
    tiny, tokenizer, task, monkeypatch, words, more
):
    rooms = []

    def generate(engine, prompts, *, num_samples, max_new_tokens, **options):
        rooms.append(max_new_tokens)
        return [[Sample([tokenizer.eos_token_id])] for _ in prompts]

    monkeypatch.setattr("latro.evaluation.accuracy.TransformersEngine.generate", generate)
    rows = [{"prompt": "How many?", "answer": answer} for answer in ("2", " ".join(["2"] * words))]
    settings = EvaluationSettings(num_samples=0, max_completion_length=5)
    evaluate_model(Scorer(tiny()), tokenizer, task, Dataset.from_list(rows), settings)
    (room,) = rooms
    longest = tokenizer.encode(f" The answer is {rows[1]['answer']}")
    assert room == 5 + max(32, len(longest) + 1) >= 5 + more


class Killed(Exception):
    """Stands for a signal that kills the process."""


@pytest.mark.parametrize("batches", [1, 2])
def test_a_killed_evaluation_goes_on_to_the_same_bits(
    tiny, tokenizer, task, tmp_path, monkeypatch, batches
):
    dataset = task.load("test", num_examples=7)
    settings = EvaluationSettings(
        num_samples=2, majority=(1, 2), max_completion_length=5, batch_size=3
    )

    def run(name):
        journal = Journal(tmp_path / name, {})
        return evaluate_model(Scorer(tiny()), tokenizer, task, dataset, settings, journal=journal)

    whole = run("whole.jsonl")
    generated = []
    generate = TransformersEngine.generate

    def killing(engine, prompts, **options):
        # Each batch is generated twice, greedy and sampled.
        if len(generated) == 2 * batches:
            raise Killed
        generated.append(len(prompts))
        return generate(engine, prompts, **options)

    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "generate", killing)
        with pytest.raises(Killed):
            run("killed.jsonl")
    killed = tmp_path / "killed.jsonl"
    assert len(killed.read_text().splitlines()) == 3 * batches
    # A line that a power failure cut off.
    with killed.open("a") as file:
        file.write('{"index": ')
    generated.clear()
    with monkeypatch.context() as patch:
        patch.setattr(
            TransformersEngine,
            "generate",
            lambda engine, prompts, **o: (
                generated.append(len(prompts)) or generate(engine, prompts, **o)
            ),
        )
        assert run("killed.jsonl") == whole
    assert sum(generated) == 2 * (7 - 3 * batches)
    assert killed.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert [json.loads(line) for line in killed.read_text().splitlines()] == whole[1]


EXAMPLES = [
    {"prompt": "Tom has 2 pens. Tom gets 3. How many?", "answer": "5", "rationale": "2+3=5."}
]


def test_what_is_invented_after_the_answer_does_not_count(tiny, tokenizer, task, monkeypatch):
    dataset = task.load("test", num_examples=1)
    right = dataset[0]["answer"]
    invented = f" So. The answer is {right}\n\nTom has 9 pens. The answer is 9"
    asked = {}

    def planted(engine, prompts, **options):
        asked.update(options, prompt=tokenizer.decode(prompts[0]))
        return [[Sample(tokenizer.encode(invented))]]

    monkeypatch.setattr("latro.evaluation.accuracy.TransformersEngine.generate", planted)
    settings = EvaluationSettings(num_samples=0)
    scorer = Scorer(tiny())
    metrics, records = evaluate_model(scorer, tokenizer, task, dataset, settings, examples=EXAMPLES)
    assert metrics["accuracy_greedy"] == 1
    (completion,) = records[0]["greedy"]
    assert completion["text"] == f" So. The answer is {right}"
    # The record has only the problem, though the model read an example before it.
    assert records[0]["prompt"] == dataset[0]["prompt"]
    shown = "Tom has 2 pens. Tom gets 3. How many? 2+3=5. The answer is 5\n\n"
    assert asked["prompt"] == shown + dataset[0]["prompt"]
    assert asked["template"] == "\n\n"
    # Without examples, completions do not end at an empty line.
    metrics, records = evaluate_model(scorer, tokenizer, task, dataset, settings)
    assert metrics["accuracy_greedy"] == 0
    assert asked["template"] is None


def test_a_special_token_behind_the_answer_is_no_part_of_it(tiny, tokenizer, monkeypatch, tmp_path):
    lines = tmp_path / "pens.jsonl"
    lines.write_text(json.dumps({"prompt": "Who has 2 pens?", "answer": "Tom"}) + "\n")
    end = tokenizer.eos_token_id
    ids = tokenizer.encode(" So. The answer is Tom")

    def planted(engine, prompts, **options):
        return [[Sample([*ids, end, end])]]

    monkeypatch.setattr("latro.evaluation.accuracy.TransformersEngine.generate", planted)
    own = read_own_data(str(lines))
    _, records = evaluate_model(
        Scorer(tiny()), tokenizer, own, own.load("test"), EvaluationSettings(num_samples=0)
    )
    (completion,) = records[0]["greedy"]
    assert completion["text"] == f" So. The answer is Tom{tokenizer.eos_token}"
    assert completion["correct"]


def test_answers_may_be_special_tokens(tiny, tokenizer, monkeypatch, tmp_path):
    made = framed(tokenizer, frames.CHATML, "<|im_start|>", "<|im_end|>", "<yes>", "<no>", "<pad>")
    made.pad_token = "<pad>"
    lines = tmp_path / "labels.jsonl"
    lines.write_text(
        "".join(json.dumps({"prompt": f"Is {n} odd?", "answer": "<yes>"}) + "\n" for n in (3, 5))
    )
    yes, no, end, pad = made.convert_tokens_to_ids(["<yes>", "<no>", "<|im_end|>", "<pad>"])
    ids = made.encode("The answer is ")
    said = iter([[*ids, yes, end, pad, pad], [*ids, no, end]])
    monkeypatch.setattr(
        "latro.evaluation.accuracy.TransformersEngine.generate",
        lambda engine, prompts, **options: [[Sample(next(said))] for _ in prompts],
    )
    own = read_own_data(str(lines))
    _, records = evaluate_model(
        Scorer(tiny(vocab_size=len(made))),
        made,
        own,
        own.load("test"),
        EvaluationSettings(num_samples=0),
    )
    completions = [record["greedy"][0] for record in records]
    assert [c["predicted"] for c in completions] == ["<yes>", "<no>"]
    assert [c["correct"] for c in completions] == [True, False]
    assert all(c["finished"] for c in completions)


@pytest.mark.parametrize(
    ("text", "predicted", "statement", "rationale"),
    [
        (" So. The answer is 3. The answer is 4.", "3", 0, " So."),
        (" I hope the answer is right. The answer is 4", "4", 1, " I hope the answer is right."),
        (" The answer isn't 6. the ANSWER is 4", "4", 0, " The answer isn't 6."),
        (" The answer is 4. I hope the answer is right", "4", 0, ""),
        # Where no statement holds an answer, the first counts, as a rollout would have ended there.
        (" I hope the answer is right.", None, 0, " I hope"),
        (" The answer isn't 6.", None, 0, " The answer isn't 6."),
    ],
)
def test_the_answer_is_scored_where_it_is_graded(
    tiny, tokenizer, monkeypatch, tmp_path, text, predicted, statement, rationale
):
    lines = tmp_path / "pens.jsonl"
    lines.write_text(json.dumps({"prompt": "Who has 2 pens?", "answer": "3"}) + "\n")
    own = read_own_data(str(lines))
    ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
    monkeypatch.setattr(
        "latro.evaluation.accuracy.TransformersEngine.generate",
        lambda engine, prompts, **options: [[Sample(ids)]],
    )
    scorer = Scorer(tiny())
    _, records = evaluate_model(
        scorer, tokenizer, own, own.load("test"), EvaluationSettings(num_samples=0)
    )
    (completion,) = records[0]["greedy"]
    assert completion["predicted"] == predicted
    join = AnswerJoin(tokenizer, own.answer_template, [tokenizer.eos_token_id])
    prompt = encode_prompt(tokenizer, "Who has 2 pens?")
    expected = join(prompt, Sample(ids), "3", statement=statement)
    assert decode(tokenizer, expected.rationale_ids).rstrip() == rationale
    assert completion["rationale_tokens"] == len(expected.rationale_ids)
    (logp,) = answer_logp(scorer, [expected], 1000)
    assert completion["answer_logp"] == pytest.approx(logp, rel=1e-5)


def test_a_completion_that_the_separator_ends_is_finished(tiny, tokenizer, task, monkeypatch):
    dataset = task.load("test", num_examples=1)
    monkeypatch.setattr(
        "latro.evaluation.accuracy.TransformersEngine.generate",
        lambda *args, **options: [[Sample(tokenizer.encode(" So.\n\n"))]],
    )
    settings = EvaluationSettings(num_samples=0)
    metrics, records = evaluate_model(
        Scorer(tiny()), tokenizer, task, dataset, settings, examples=EXAMPLES
    )
    assert metrics["unfinished"] == 0
    assert metrics["rationale_length"] == len(tokenizer.encode(" So."))
    assert records[0]["greedy"][0]["predicted"] is None


def test_a_chat_goes_on_past_an_empty_line(tiny, tokenizer, task, monkeypatch):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    dataset = task.load("test", num_examples=1)
    text = f"So.\n\nThe answer is {dataset[0]['answer']}"
    asked = {}

    def planted(engine, prompts, **options):
        asked.update(options, prompt=tokenizer.decode(prompts[0]))
        return [[Sample([*tokenizer.encode(text), tokenizer.eos_token_id])]]

    monkeypatch.setattr("latro.evaluation.accuracy.TransformersEngine.generate", planted)
    settings = EvaluationSettings(num_samples=0)
    metrics, _ = evaluate_model(
        Scorer(tiny()), tokenizer, task, dataset, settings, examples=EXAMPLES
    )
    assert metrics["accuracy_greedy"] == 1
    assert asked["template"] is None
    assert "<assistant>2+3=5. The answer is 5<user>" in asked["prompt"]


@pytest.mark.parametrize(
    ("answer", "positions", "expected"),
    [
        ("5", 1024, lambda prompt, answer: 100 + 32),
        # The longest answer has room if it has more than 32 tokens.
        ("5 " * 40, 1024, lambda prompt, answer: 100 + answer),
        # A completion and the answer after it stay within the model's positions.
        ("5", 128, lambda prompt, answer: 128 - prompt - answer),
    ],
)
def test_the_room_for_an_answer(tiny, tokenizer, task, monkeypatch, answer, positions, expected):
    dataset = Dataset.from_list([{"prompt": "Tom has 2 pens.", "answer": answer}])
    asked = {}

    def planted(engine, prompts, **options):
        asked.update(options, prompt=prompts[0])
        return [[Sample([tokenizer.eos_token_id])]]

    monkeypatch.setattr("latro.evaluation.accuracy.TransformersEngine.generate", planted)
    settings = EvaluationSettings(num_samples=0, max_completion_length=100)
    scorer = Scorer(tiny(max_position_embeddings=positions))
    evaluate_model(scorer, tokenizer, task, dataset, settings)
    join = AnswerJoin(tokenizer, task.answer_template, [tokenizer.eos_token_id])
    length = len(join(asked["prompt"], Sample([]), answer).answer_ids)
    assert asked["max_new_tokens"] == expected(len(asked["prompt"]), length)


def test_a_record_has_what_it_is_graded_against(tiny, tokenizer, task):
    row = {"prompt": "Tom has 2 pens.", "answer": "2 pens", "ground_truth": "2", "more": "x"}
    settings = EvaluationSettings(num_samples=0, max_completion_length=2)
    _, (record,) = evaluate_model(
        Scorer(tiny()), tokenizer, task, Dataset.from_list([row]), settings
    )
    assert list(record) == ["index", "prompt", "answer", "ground_truth", "greedy"]
    assert record["ground_truth"] == "2"


def test_examples_that_do_not_fit_the_model_are_refused(tiny, tokenizer, task):
    dataset = task.load("test", num_examples=1)
    scorer = Scorer(tiny(max_position_embeddings=48))
    settings = EvaluationSettings(num_samples=0, max_completion_length=8)
    with pytest.raises(ValueError, match="lower max_completion_length or drop the row"):
        evaluate_model(scorer, tokenizer, task, dataset, settings, examples=EXAMPLES * 3)


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
        ({"num_samples": -1}, "num_samples: expected at least 0, got -1"),
        ({"max_completion_length": 0}, "max_completion_length: expected at least 1, got 0"),
        ({"temperature": 0}, "temperature: expected a number above 0, got 0; greedy"),
        ({"temperature": math.nan}, "temperature: expected a number above 0, got nan"),
        ({"temperature": 1e-50}, "temperature: expected a number from 1.18e-38 to .*, got 1e-50"),
        ({"num_samples": 2, "majority": (4,)}, "k from 1 to num_samples = 2, got 4"),
        ({"majority": (0,)}, "got 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        EvaluationSettings(**settings)
