import re
import sys
from itertools import islice

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from latro.tasks import get_task
from scripts.pretrain_small_model import generate_documents, main

TASK = get_task("arithmetic")


def run(monkeypatch, output_dir, *extra):
    sizes = ["--steps", "2", "--batch_size", "4", "--tokenizer_documents", "500"]
    argv = ["pretrain_small_model.py", "--output_dir", str(output_dir), *sizes, *extra]
    monkeypatch.setattr(sys, "argv", argv)
    main()
    return AutoModelForCausalLM.from_pretrained(output_dir).state_dict()


def test_every_document_ends_with_the_right_answer():
    for document in islice(generate_documents(0), 2000):
        problem, rationale = re.fullmatch(r"(.*\?)(.*)", document).groups()
        start = int(re.search(r"has (\d+)", problem)[1])
        changes = [
            int(amount) * (1 if verb in ("gets", "finds", "buys", "wins") else -1)
            for verb, amount in re.findall(r"(\w+) (\d)\.", problem)
        ]
        assert TASK.grade(rationale, {"prompt": problem, "answer": str(start + sum(changes))})


def test_the_mixture_holds_right_steps_slips_filler_and_bare_answers():
    counts = dict.fromkeys(("right", "slip", "filler", "bare"), 0)
    for document in islice(generate_documents(0), 4000):
        rationale, answer = document.partition("? ")[2].split("The answer is ")
        steps = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", rationale)
        if not rationale:
            counts["bare"] += 1
        elif not steps:
            counts["filler"] += 1
        elif steps[-1][-1] == answer:
            counts["right"] += 1
        else:
            counts["slip"] += 1
    shares = {kind: count / 4000 for kind, count in counts.items()}
    # A binomial share of 4,000 strays by 0.8 points; a slip that stops at zero may be none.
    assert shares == pytest.approx(
        {"right": 0.30, "slip": 0.15, "filler": 0.45, "bare": 0.10}, abs=0.04
    )


def test_a_run_replaces_the_folder_and_leaves_nothing_beside_it(tmp_path, monkeypatch):
    output_dir = tmp_path / "models" / "small"
    output_dir.mkdir(parents=True)
    (output_dir / "stale.txt").touch()
    run(monkeypatch, output_dir)
    assert not (output_dir / "stale.txt").exists()
    assert [path.name for path in output_dir.parent.iterdir()] == ["small"]
    assert AutoTokenizer.from_pretrained(output_dir).eos_token == "<eos>"


def test_the_seed_fixes_the_weights(tmp_path, monkeypatch):
    first = run(monkeypatch, tmp_path / "a")
    again = run(monkeypatch, tmp_path / "b")
    other = run(monkeypatch, tmp_path / "c", "--seed", "7")
    for name, weight in first.items():
        torch.testing.assert_close(weight, again[name], rtol=0, atol=0)
    assert any(not torch.equal(weight, other[name]) for name, weight in first.items())
