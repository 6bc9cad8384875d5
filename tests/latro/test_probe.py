"""`python -m latro.probe`: what it measures and what it leaves."""

from __future__ import annotations

import json
import math
from statistics import fmean, stdev

import pytest
import torch
from datasets import Dataset
from PIL import Image

from latro.engines.transformers import seed_of
from latro.evaluation.likelihood import KINDS, ProbeSettings, gains, probe_model, summary
from latro.model.scoring import Scorer
from latro.probe import probe
from latro.rollout.prompts import encode_prompt
from latro.run.folder import lock_of, locked
from tests.latro.fake_vllm import sample_for_real


@pytest.fixture
def worked(dataset) -> Dataset:
    """Return the toy problems, all but the last with a solution."""
    texts = [f"Tom gets {i}. " * (i % 3) + f"He has {i}." for i in range(len(dataset) - 1)]
    return dataset.add_column("rationale", [*texts, ""])


@pytest.fixture
def records(tiny, tokenizer, task, worked):
    settings = ProbeSettings(num_samples=3, max_completion_length=6, batch_size=3)
    return probe_model(Scorer(tiny()), tokenizer, task, worked, settings)


def by_whole_logits(model, tokenizer, prompt, rationale, answer):
    """Return log π(y|x⊕z) and the answer's number of tokens, from the model's whole logits."""
    given = encode_prompt(tokenizer, prompt)
    if rationale:
        given += tokenizer.encode(f" {rationale}", add_special_tokens=False)
    text = f" The answer is {answer}"
    answer_ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    logits = model(input_ids=torch.tensor([given + answer_ids])).logits[0, len(given) - 1 : -1]
    logp = logits.log_softmax(-1)[range(len(answer_ids)), answer_ids]
    return logp.sum().item(), len(answer_ids)


@torch.no_grad()
def test_likelihoods_are_those_of_whole_logits(records, tiny, tokenizer, worked):
    model = tiny().eval()
    for row, record in zip(worked, records, strict=True):
        for kind, rationale in (("none", ""), ("gold", row["rationale"])):
            if kind == "gold" and not rationale:
                assert "gold" not in record
                continue
            (entry,) = record[kind]
            logp, count = by_whole_logits(model, tokenizer, row["prompt"], rationale, row["answer"])
            assert entry["answer_logp"] == pytest.approx(logp, rel=1e-4)
            assert entry["answer_tokens"] == count
            assert entry["rationale"].strip() == rationale
        assert [len(record[kind]) for kind in ("greedy", "sampled")] == [1, 3]


def test_a_rationale_that_is_none_is_left_out(records, tiny, tokenizer, task, worked):
    """As rows have it that leave a column out."""
    texts = [text or None for text in worked["rationale"]]
    worked = worked.remove_columns("rationale").add_column("rationale", texts)
    settings = ProbeSettings(num_samples=3, max_completion_length=6, batch_size=3)
    assert probe_model(Scorer(tiny()), tokenizer, task, worked, settings) == records


def test_problems_do_not_depend_on_their_batch(records, tiny, tokenizer, task, worked):
    settings = ProbeSettings(num_samples=3, max_completion_length=6, batch_size=64)
    whole = probe_model(Scorer(tiny()), tokenizer, task, worked, settings)
    for ours, theirs in zip(records, whole, strict=True):
        for kind in ("none", "greedy", "sampled"):
            assert [e["rationale"] for e in ours[kind]] == [e["rationale"] for e in theirs[kind]]
            for a, b in zip(ours[kind], theirs[kind], strict=True):
                assert a["answer_logp"] == pytest.approx(b["answer_logp"], rel=1e-4)


def entry(logp, tokens=2):
    return {"rationale": "", "answer_logp": logp, "answer_tokens": tokens}


def test_summary_pairs_problems():
    records = [
        {"none": [entry(-4.0)], "gold": [entry(-1.0)], "sampled": [entry(-2.0), entry(-6.0)]},
        {"none": [entry(-2.0)], "sampled": [entry(-1.0), entry(-1.0, tokens=1)]},
    ]
    found = summary(records)
    assert list(found) == ["none", "gold", "sampled"]
    assert found["none"]["sequence"] == {"mean": -3.0, "stderr": pytest.approx(1.0)}
    assert found["none"]["token"]["mean"] == -1.5
    assert "helps" not in found["none"]
    assert found["gold"]["problems"] == 1
    assert found["gold"]["sequence_gain"] == {"mean": 3.0, "stderr": 0.0}
    # The gains per problem are (2 − 2)/2 and (1 + 1)/2.
    expected = [0.0, 1.0]
    assert found["sampled"]["sequence_gain"]["mean"] == fmean(expected)
    assert found["sampled"]["sequence_gain"]["stderr"] == pytest.approx(stdev(expected) / 2**0.5)
    assert gains(records[1], "sampled", "token") == [0.5, 0.0]
    assert found["sampled"]["helps"] == 0.75


@pytest.fixture
def small(tmp_path):
    """Return `small(*more)`, which runs the command on a few problems and returns its result."""

    def run(*more: str):
        return probe(
            [
                *("--num_eval_examples", "4", "--num_samples", "2"),
                *("--max_completion_length", "8", "--output", str(tmp_path / "out" / "p.json")),
                *more,
            ]
        )

    return run


@pytest.mark.parametrize("name", ["p.json", "p.png"])
def test_what_is_there_is_written_over_only_when_asked(small, tmp_path, name):
    path = tmp_path / "out" / name
    path.parent.mkdir()
    path.write_text("mine")
    with pytest.raises(ValueError, match=rf"^output: .*{name} is there already"):
        small()
    assert path.read_text() == "mine"
    small("--overwrite", "true")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["p.json", "p.png"]
    assert path.read_bytes() != b"mine"


def test_two_probes_at_once_on_one_output(small, tmp_path):
    with (
        locked(lock_of(tmp_path / "out" / "p.json"), "output: it"),
        pytest.raises(ValueError, match=r"^output: .* is in use by process"),
    ):
        small()
    assert list(tmp_path.iterdir()) == []


def test_it_leaves_a_json_file_and_a_picture(small, tmp_path, capsys):
    result = small()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["p.json", "p.png"]
    assert json.loads((tmp_path / "out" / "p.json").read_text()) == result
    assert list(result["summary"]) == list(KINDS)
    assert len(result["problems"]) == 4
    assert result["settings"]["num_samples"] == 2
    with Image.open(tmp_path / "out" / "p.png") as picture:
        assert picture.size == (1320, 540)
    shown = capsys.readouterr().out
    assert "own, sampled" in shown
    assert "left out" not in shown


def test_impossible_answers_are_null_and_no_error(small, tmp_path, monkeypatch):
    """In one problem without a rationale, in another behind one: gains of both signs."""

    def impossible(scorer, rollouts, token_budget):
        return [-math.inf if i in (0, len(rollouts) - 1) else -1.0 for i in range(len(rollouts))]

    monkeypatch.setattr("latro.evaluation.likelihood.answer_logp", impossible)
    found = small()["summary"]
    assert found["none"]["sequence"]["mean"] == -math.inf
    assert math.isnan(found["sampled"]["sequence_gain"]["mean"])
    written = json.loads((tmp_path / "out" / "p.json").read_text())
    assert written["summary"]["none"]["sequence"] == {"mean": None, "stderr": None}
    Image.open(tmp_path / "out" / "p.png").verify()


def test_a_vllm_server_gives_the_same_rationales(small, tmp_path, fake, small_tokenizer):
    here = small()
    fake.tokenizer = small_tokenizer
    sample_for_real(fake, [seed_of(42, index) for index in range(4)], template="The answer is")
    served = small("--overwrite", "--rollout_engine", "vllm", "--vllm_url", fake.url)
    for ours, theirs in zip(served["problems"], here["problems"], strict=True):
        for kind in KINDS:
            assert [e["rationale"] for e in ours[kind]] == [e["rationale"] for e in theirs[kind]]
            for a, b in zip(ours[kind], theirs[kind], strict=True):
                assert a["answer_logp"] == pytest.approx(b["answer_logp"], rel=1e-4)


def test_processes_share_the_problems(small, tmp_path, warm):
    argv = [
        *("--num_eval_examples", "4", "--num_samples", "2", "--max_completion_length", "8"),
        # Batches of 3 and of 1; the last leaves some processes without a problem.
        *("--batch_size", "1", "--output", str(tmp_path / "shared" / "p.json")),
    ]
    done = warm.run_together("latro.probe", argv, tmp_path / "printed", processes=3)
    # Only one process prints.
    assert done.stdout.count("written to") == 1
    alone = small()["problems"]
    shared = json.loads((tmp_path / "shared" / "p.json").read_text())["problems"]
    assert len(shared) == len(alone)
    for ours, theirs in zip(shared, alone, strict=True):
        assert (ours["index"], ours["prompt"]) == (theirs["index"], theirs["prompt"])
        for kind in KINDS:
            assert [e["rationale"] for e in ours[kind]] == [e["rationale"] for e in theirs[kind]]
            for a, b in zip(ours[kind], theirs[kind], strict=True):
                assert a["answer_logp"] == pytest.approx(b["answer_logp"], rel=1e-4)


def test_a_task_without_rationales_says_so(tiny, tokenizer, tmp_path, capsys, small):
    tiny(max_position_embeddings=512).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    question = {"stem": "Which?", "choices": []}
    question["choices"] = [{"label": label, "text": f"It is {label}."} for label in "ABCD"]
    lines = [{"id": str(i), "question": question, "answerKey": "ABCD"[i]} for i in range(4)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = small(
        *("--model_name_or_path", str(tmp_path / "model"), "--num_samples", "0"),
        *("--dataset_name", "arc_challenge", "--dataset_path", str(tmp_path)),
        *("--eval_split", "test"),
    )
    assert list(result["summary"]) == ["none", "greedy"]
    assert "arc_challenge has no written rationales: they are left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--num_samples", "-1"), "num_samples: expected at least 0, got -1"),
        (("--batch_size", "0"), "batch_size: expected at least 1"),
        (("--max_completion_length", "100000"), "lower max_completion_length"),
        (("--output", "probe.png"), "output: expected a file name that ends in .json"),
        (("--temperature", "0"), "temperature: expected a number above 0, got 0"),
        (("--eval_split", "tset"), "tset"),
    ],
)
def test_nothing_is_written_on_an_error(small, tmp_path, argv, message):
    with pytest.raises(ValueError, match=message):
        small(*argv)
    assert not (tmp_path / "out").exists()


def test_written_rationales_that_do_not_fit_are_named(tiny, tokenizer, task, dataset):
    rows = dataset.add_column("rationale", ["Tom gets 5. " * 60] * len(dataset))
    model = tiny(max_position_embeddings=64)
    settings = ProbeSettings(max_completion_length=6)
    with pytest.raises(ValueError, match=r"dataset: row 0: prompt, .* model has 64; drop"):
        probe_model(Scorer(model), tokenizer, task, rows, settings)
