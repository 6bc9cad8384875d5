from __future__ import annotations

import re
from dataclasses import replace

import markdown
import pytest
import yaml
from huggingface_hub import ModelCard

from latro.reporting.model_card import (
    LONGEST_TEXT,
    METHODS,
    HeldOut,
    Run,
    Setting,
    model_card,
    write_card,
)
from latro.terminal import shown

BEFORE = {
    "step": 0,
    "eval_accuracy_greedy": 0.1,
    "eval_accuracy_sampled": 0.2,
    "eval_accuracy_sampled_stderr": 0.01,
}
AFTER = {**BEFORE, "step": 160, "eval_accuracy_greedy": 0.876}


def problem(text="6", **more):
    return {
        "prompt": "How many?",
        "answer": "5",
        "text": text,
        "predicted": text,
        "correct": text == "5",
        **more,
    }


RUN = Run(
    name="phi-gsm8k",
    method="latro",
    task="gsm8k",
    prompts=7473,
    update=160,
    base_model="microsoft/Phi-3.5-mini-instruct",
    dataset="openai/gsm8k",
    settings=[Setting("beta", 0.25, 0.05), Setting("kl", "reward", "reward")],
    held_out=HeldOut(500, "validation", "latro.tasks.gsm8k.GSM8K", 300, 1.0, 1, "python -m x"),
    before=BEFORE,
    after=AFTER,
    samples_before=[problem("6")],
    samples_after=[problem("5")],
    picture="progress.png",
    tags=["trackio"],
)


def test_the_front_matter_is_what_the_hub_reads(tmp_path):
    write_card(RUN, tmp_path)
    (path,) = tmp_path.iterdir()
    data = ModelCard.load(path).data
    assert data.base_model == "microsoft/Phi-3.5-mini-instruct"
    assert data.datasets == ["openai/gsm8k"]
    assert data.library_name == "transformers"
    assert data.tags == ["latro", "trackio"]
    results = {r.metric_name: (r.metric_value, r.dataset_split) for r in data.eval_results}
    assert results == {
        "greedy accuracy": (0.876, "validation"),
        "sampled accuracy": (0.2, "validation"),
    }
    adapter = model_card(replace(RUN, adapter="a LORA adapter of rank 16"))
    assert adapter.data.library_name == "peft"
    assert "a LORA adapter of rank 16 on [microsoft/Phi" in adapter.text


def test_the_card_tells_the_run():
    text = model_card(RUN).text
    assert "LaTRO on 7,473 prompts of gsm8k" in text
    assert "| 500 held-out problems | update 0 | update 160 |" in text
    assert "| greedy accuracy | 10.0% | 87.6% |" in text
    assert "![the run, update by update](progress.png)" in text
    assert "Before, states `6`, wrong:\n\n```text\n6\n```" in text
    assert "After, states `5`, right:\n\n```text\n5\n```" in text
    assert "| `beta` | `0.25` | `0.05` |" in text
    assert "| `kl` | `reward` |  |" in text
    assert "python -m x" in text
    assert "latro.tasks.gsm8k.GSM8K" in text
    assert "2411.04282" in text


def test_a_run_of_which_little_is_known():
    run = Run("run", "verifree", "numbers", prompts=3, update=0)
    card = model_card(run)
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["latro"],
    }
    assert "progress" not in card.text
    assert "## Results" not in card.text
    assert "## Samples" not in card.text
    assert METHODS["verifree"].arxiv in card.text


def test_one_evaluation_is_one_column():
    text = model_card(replace(RUN, before=AFTER, samples_before=())).text
    assert "| 500 held-out problems | update 160 |\n" in text
    assert "Before" not in text


def test_texts_do_not_break_out_of_the_card():
    hostile = "```\n# Not a heading\n````\n| a | b |"
    sample = problem(hostile, predicted="a | `b`\nc", prompt=hostile)
    text = model_card(replace(RUN, samples_before=[], samples_after=[sample])).text
    assert f"`````text\n{hostile}\n`````" in text
    assert "states ``a \\| `b` c``, wrong" in text
    # Text outside of fences is the card's own.
    outside = re.sub(r"(?ms)^(`{3,})\w+\n.*?^\1$", "", text)
    assert "Not a heading" not in outside
    assert "\n# " in outside


HOSTILE = "a: \"b\" 'c' [x](y) <script> | `d` _e_ $f$ # \x1b[2J\n---\nkey: value \udc80"


def test_names_do_not_break_out_of_the_card(tmp_path):
    run = replace(
        RUN,
        name=HOSTILE,
        task=HOSTILE,
        base=HOSTILE,
        base_model=None,
        dataset=None,
        device=HOSTILE,
        settings=[Setting("beta", HOSTILE, None)],
        held_out=replace(RUN.held_out, split=HOSTILE, command=HOSTILE),
        samples_after=[problem(HOSTILE, prompt=HOSTILE, answer=HOSTILE)],
    )
    write_card(run, tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    (result, _) = card.data.eval_results
    assert card.data.model_name == shown(HOSTILE)
    assert (result.dataset_name, result.dataset_split) == (shown(HOSTILE),) * 2
    assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "tags", "model-index"}
    assert "\x1b" not in card.content
    # Markup outside of code is the card's own.
    page = markdown.markdown(card.text, extensions=["fenced_code", "tables"])
    prose = re.sub(r"<code.*?</code>", "", page, flags=re.S)
    assert not re.search(r"<(?!/?(h\d|p|table|t[rhd]|thead|tbody|img|pre)\b)", prose)
    assert prose.count("&lt;script&gt;") == 4
    assert len({line.count("<td") for line in re.findall(r"<tr>(.*?)</tr>", page, re.S)[1:2]}) == 1


def test_long_texts_are_cut():
    sample = problem("x" * (LONGEST_TEXT + 1234), prompt=[{"role": "user", "content": "Why?"}])
    text = model_card(replace(RUN, samples_after=[sample])).text
    assert f"\n{'x' * LONGEST_TEXT}\n… (1,234 characters more)\n" in text
    assert "```text\nWhy?\n```" in text


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_its_card(method):
    card = model_card(replace(RUN, method=method))
    assert METHODS[method].title in card.text
    assert yaml.safe_load(card.data.to_yaml())["tags"] == ["latro", "trackio"]
