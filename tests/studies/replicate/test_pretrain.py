import re
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from latro.config.training import SMALL_MODEL
from studies.replicate.pretrain import (
    ARCHITECTURES,
    IGNORE_INDEX,
    TASKS,
    Arguments,
    build_model,
    generate_documents,
    main,
    make_batch,
    train_tokenizer,
)


def run(monkeypatch, output_dir, *extra):
    sizes = ["--steps", "2", "--batch_size", "4", "--tokenizer_documents", "500"]
    argv = ["pretrain", "--output_dir", str(output_dir), *sizes, *extra]
    monkeypatch.setattr(sys, "argv", argv)
    main()
    return AutoModelForCausalLM.from_pretrained(output_dir).state_dict()


@pytest.mark.parametrize("name", TASKS)
def test_every_completion_ends_with_the_right_answer(name):
    task = TASKS[name]
    rows = {problem.prompt: problem.row for problem in islice(task.problems("train", 0), 2000)}
    for prompt, completion in islice(generate_documents(task, 0), 2000):
        assert task.grade(completion, rows[prompt])


def test_a_right_answer_is_that_of_the_story():
    for problem, rationale in islice(generate_documents(TASKS["arithmetic"], 0), 200):
        start = int(re.search(r"has (\d+)", problem)[1])
        changes = [
            int(amount) * (1 if verb in ("gets", "finds", "buys", "wins") else -1)
            for verb, amount in re.findall(r"(\w+) (\d)\.", problem)
        ]
        assert rationale.endswith(f" The answer is {start + sum(changes)}")


def test_the_mixture_holds_right_steps_slips_filler_and_bare_answers():
    counts = dict.fromkeys(("right", "slip", "filler", "bare"), 0)
    for _, completion in islice(generate_documents(TASKS["arithmetic"], 0), 4000):
        rationale, answer = completion.split("The answer is ")
        steps = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", rationale)
        if not rationale.strip():
            counts["bare"] += 1
        elif not steps:
            counts["filler"] += 1
        elif steps[-1][-1] == answer:
            counts["right"] += 1
        else:
            counts["slip"] += 1
    shares = {kind: count / 4000 for kind, count in counts.items()}
    # The standard deviation of the share is 0.8 points; a slip below zero may have no effect.
    assert shares == pytest.approx(
        {"right": 0.30, "slip": 0.15, "filler": 0.45, "bare": 0.10}, abs=0.04
    )


@pytest.mark.parametrize("name", TASKS)
def test_the_first_documents_have_right_steps_alone(name):
    task = TASKS[name]
    problems = task.problems("train", 0)
    documents = list(islice(generate_documents(task, 0, right=300), 600))
    as_solved = [c.startswith(" ".join(["", *next(problems).steps(), ""])) for _, c in documents]
    assert all(as_solved[:300])
    assert 0.2 < sum(as_solved[300:]) / 300 < 0.5


def test_the_model_that_ships_has_settings_of_its_own():
    assert Arguments(Path()).steps == 1600
    assert Arguments(Path()).learn_prompts
    assert Arguments(Path(), steps=5).steps == 5
    assert Arguments(Path(), architecture="phi3").right_steps == 1700
    assert Arguments(Path()).mixture != Arguments(Path(), task="arithmetic_choice").mixture
    assert Arguments(Path(), architecture="phi3", right_steps=0).right_steps == 0


def test_a_model_of_choice_goes_on_from_one_of_arithmetic(tmp_path, monkeypatch):
    choice = ("--task", "arithmetic_choice", "--learning_rate", "0")
    weights = run(monkeypatch, tmp_path / "llama", *choice)
    for name, weight in AutoModelForCausalLM.from_pretrained(SMALL_MODEL).named_parameters():
        torch.testing.assert_close(weights[name], weight.detach(), rtol=0, atol=0)
    run(monkeypatch, tmp_path / "phi3", "--architecture", "phi3")
    start_from = ("--architecture", "phi3", "--start_from", str(tmp_path / "phi3"))
    run(monkeypatch, tmp_path / "choice", *choice, *start_from)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "choice").config.model_type == "phi3"


@pytest.mark.parametrize(
    "given",
    [
        {"architecture": "phi3", "task": "arithmetic_choice"},
        {"task": "arithmetic", "start_from": "models/small"},
    ],
)
def test_what_to_start_from_is_asked_for_or_refused(given):
    with pytest.raises(ValueError, match="start_from: expected"):
        Arguments(Path(), **given)


@pytest.fixture(scope="module", params=TASKS)
def tokenizer(request):
    return train_tokenizer(Arguments(Path(), task=request.param, tokenizer_documents=5000))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_has_about_a_million_parameters_and_loads_as_itself(
    architecture, tokenizer, tmp_path
):
    model = build_model(architecture, tokenizer)
    assert 0.9e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.1e6
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.model_type == architecture
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id


def test_what_is_learnt_is_the_document_or_its_completion(tokenizer):
    documents = [("Tom has 3 pens. How many?", " The answer is 3"), ("A", " B C")]
    whole, completions = (
        ["".join(d) for d in documents],
        [completion for _, completion in documents],
    )
    for learn_prompts, learnt in ((True, whole), (False, completions)):
        input_ids, labels = make_batch(documents, tokenizer, learn_prompts)
        assert input_ids.shape == labels.shape
        for row, text in enumerate(learnt):
            kept = labels[row] != IGNORE_INDEX
            assert tokenizer.decode(labels[row][kept]) == text + "<eos>"
            assert torch.equal(labels[row][kept], input_ids[row][kept])


def test_a_run_replaces_the_folder_and_leaves_nothing_beside_it(tmp_path, monkeypatch):
    output_dir = tmp_path / "models" / "small"
    output_dir.mkdir(parents=True)
    for name in ("config.json", "stale.txt"):
        (output_dir / name).touch()
    run(monkeypatch, output_dir)
    assert not (output_dir / "stale.txt").exists()
    assert [path.name for path in output_dir.parent.iterdir()] == ["small"]
    assert AutoTokenizer.from_pretrained(output_dir).eos_token == "<eos>"


def test_a_folder_that_has_no_model_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match="output_dir: expected a new folder, or a model's"):
        run(monkeypatch, tmp_path)
    assert (tmp_path / "notes").read_text() == "mine"


def test_the_seed_fixes_the_weights(tmp_path, monkeypatch):
    first = run(monkeypatch, tmp_path / "a")
    again = run(monkeypatch, tmp_path / "b")
    other = run(monkeypatch, tmp_path / "c", "--seed", "7")
    for name, weight in first.items():
        torch.testing.assert_close(weight, again[name], rtol=0, atol=0)
    assert any(not torch.equal(weight, other[name]) for name, weight in first.items())
