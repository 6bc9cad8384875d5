"""Models that think, and chat templates with arguments, through training and scoring."""

from __future__ import annotations

import json
import shlex

import pytest

from latro import LatroConfig, LatroTrainer, SftConfig, SftTrainer
from latro.config.data import DataArguments
from latro.engines.transformers import TransformersEngine
from latro.evaluate import evaluate
from latro.evaluation.accuracy import EvaluationSettings, evaluate_model
from latro.evaluation.likelihood import ProbeSettings, probe_model
from latro.model.scoring import Scorer
from latro.probe import probe
from latro.problems import load_task
from latro.reporting.run_summary import run_of
from latro.rollout.frame import Chat
from latro.rollout.sequences import Sample, decode
from latro.run.identity import RUN_FILE
from latro.sft import sft
from latro.train import train
from tests.latro.hostile import ROWS
from tests.latro.thinking_frames import THINKING


@pytest.fixture(params=["Qwen3", "Qwen3-Thinking", "gpt-oss"])
def family(request):
    return THINKING[request.param]


@pytest.fixture
def thinker(family, tokenizer):
    return family.tokenizer(tokenizer)


@pytest.fixture
def asked(family, task):
    """Return the task with the arguments of the family's template."""
    task.chat = Chat("Be brief.", family.kwargs)
    return task


def settings(tmp_path):
    return {
        "output_dir": str(tmp_path / "run"),
        "max_completion_length": 6,
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
    }


def test_rationales_of_training_are_thoughts(
    family, thinker, tiny, asked, dataset, tmp_path, monkeypatch
):
    engine_asked = []

    def generate(engine, prompts, *, num_samples, template, **options):
        engine_asked.append(template)
        ids = thinker.encode(f"2+3. The answer is 6{family.closing}", add_special_tokens=False)
        return [[Sample(ids), *[Sample([7, 8])] * (num_samples - 1)] for _ in prompts]

    monkeypatch.setattr(TransformersEngine, "generate", generate)
    config = LatroConfig(**settings(tmp_path), num_generations=4)
    trainer = LatroTrainer(tiny(vocab_size=len(thinker)), config, dataset, thinker, asked)
    groups = trainer._rollouts(dataset.to_list()[:2])
    assert engine_asked == [family.closing]
    for group, row in zip(groups, dataset, strict=False):
        prompt = decode(thinker, group[0].prompt_ids)
        assert prompt.endswith(family.prompt_end)
        assert "Be brief." in prompt
        assert [r.finished for r in group] == [True, False, False, False]
        answer = f"{family.closing}{family.behind}The answer is {row['answer']}{family.end}"
        texts = {decode(thinker, r.answer_ids).removeprefix("\n") for r in group}
        assert texts == {answer}
    trainer.train()
    assert trainer.state.global_step == 1


def test_sft_learns_thoughts(family, thinker, tiny, asked, dataset, tmp_path):
    worked = dataset.add_column("rationale", ["So it is."] * len(dataset))
    model = tiny(vocab_size=len(thinker))
    trainer = SftTrainer(model, SftConfig(**settings(tmp_path)), worked, thinker, asked)
    rollout = trainer._target(worked[0])
    text = decode(thinker, rollout.input_ids + rollout.answer_ids[-1:])
    answer = f"The answer is {worked[0]['answer']}{family.end}"
    closed = f"{family.before}{family.closing}{family.behind}"
    assert text.endswith(f"{family.prompt_end}So it is.{closed}{answer}")


def test_what_is_graded_stands_behind_the_thoughts(
    family, thinker, tiny, asked, dataset, monkeypatch
):
    """Thoughts that state the answer earn nothing, and ones that reject another cost nothing."""
    right = dataset[0]["answer"]
    wrong = str(int(right) + 1)
    close = f"{family.closing}{family.behind}"
    texts = {
        f"The answer is {wrong}? No.{close}So. The answer is {right}": right,
        f"The answer is {right}? No.{close}The answer is {wrong}": wrong,
        f"The answer is {right}.": None,
    }
    scored = []

    def generate(engine, prompts, *, num_samples, template=None, **options):
        assert template is None
        ends = [thinker.convert_tokens_to_ids(family.end)]
        ids = [thinker.encode(t, add_special_tokens=False) + ends for t in texts]
        return [[Sample(i) for i in ids[:num_samples]] for _ in prompts]

    def answer_logp(scorer, rollouts, token_budget):
        scored.extend(rollouts)
        return [-1.0] * len(rollouts)

    monkeypatch.setattr(TransformersEngine, "generate", generate)
    monkeypatch.setattr("latro.evaluation.accuracy.answer_logp", answer_logp)
    scorer = Scorer(tiny(vocab_size=len(thinker)))
    rows = dataset.select([0])
    _, [record] = evaluate_model(scorer, thinker, asked, rows, EvaluationSettings(num_samples=3))
    assert [c["predicted"] for c in record["sampled"]] == list(texts.values())
    assert [c["correct"] for c in record["sampled"]] == [True, False, False]
    # What is scored is the known answer right behind the thoughts, as in training.
    for rollout in scored:
        y = decode(thinker, rollout.answer_ids)
        assert y.removeprefix("\n") == f"{close}The answer is {right}{family.end}"


def test_the_probe_ends_thoughts_as_training_does(
    family, thinker, tiny, asked, dataset, monkeypatch
):
    wanted = []
    generate = TransformersEngine.generate

    def noting(engine, prompts, **options):
        wanted.append(options["template"])
        return generate(engine, prompts, **options)

    monkeypatch.setattr(TransformersEngine, "generate", noting)
    scorer = Scorer(tiny(vocab_size=len(thinker)))
    probing = ProbeSettings(num_samples=2, max_completion_length=6)
    records = probe_model(scorer, thinker, asked, dataset.select([0, 1]), probing)
    assert set(wanted) == {family.closing}
    assert all(entry["answer_logp"] < 0 for r in records for entry in [*r["none"], *r["sampled"]])


@pytest.fixture
def place(tiny, tokenizer, tmp_path):
    """Return a folder with a model of a hybrid template, and data."""
    made = THINKING["Qwen3"].tokenizer(tokenizer)
    tiny(vocab_size=len(made)).save_pretrained(tmp_path / "model")
    made.save_pretrained(tmp_path / "model")
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "data.jsonl").write_text(lines)
    return tmp_path


def arguments(place, output, *more):
    return [
        *("--model_name_or_path", str(place / "model"), "--max_steps", "1", *more),
        *("--dataset_name", str(place / "data.jsonl"), "--num_eval_examples", "2"),
        *("--per_device_train_batch_size", "2", "--use_cpu", "true", "--disable_tqdm", "true"),
        *("--max_completion_length", "4", "--output_dir", str(output), "--save_steps", "1"),
        *("--save_strategy", "steps"),
    ]


@pytest.mark.parametrize(
    ("command", "more"), [(train, ["--num_generations", "2"]), (sft, ["--target", "answer"])]
)
def test_the_commands_take_them_and_a_run_keeps_them(place, tmp_path, command, more):
    chat = ["--system_prompt", "Be brief.", "--chat_template_kwargs", '{"enable_thinking": false}']
    argv = arguments(place, tmp_path / "run", *more)
    command([*argv, *chat])
    facts = json.loads((tmp_path / "run" / "checkpoint-1" / RUN_FILE).read_text())["decides"]
    assert facts["system_prompt"] == "Be brief."
    assert facts["chat_template_kwargs"] == {"enable_thinking": False}
    resume = [*argv, "--resume_from_checkpoint", "true", "--max_steps", "2"]
    with pytest.raises(ValueError, match=r"system_prompt was 'Be brief.', now None") as told:
        command(resume)
    assert "chat_template_kwargs was {'enable_thinking': False}, now {}" in str(told.value)
    command([*resume, *chat])


def test_an_evaluation_and_a_probe_ask_as_the_training_did(place, tmp_path):
    data = DataArguments(
        str(place / "data.jsonl"),
        system_prompt="Be brief.",
        chat_template_kwargs='{"enable_thinking": false}',
    )
    task = load_task(data)
    assert task.chat == Chat("Be brief.", {"enable_thinking": False})
    shared = [
        *("--model_name_or_path", str(place / "model"), "--dataset_name", data.dataset_name),
        *("--num_eval_examples", "2", "--num_samples", "1", "--max_completion_length", "4"),
        *("--eval_split", "validation"),
    ]
    chat = ["--system_prompt", "Be brief.", "--chat_template_kwargs", '{"enable_thinking": false}']
    told = {"system_prompt": "Be brief.", "chat_template_kwargs": {"enable_thinking": False}}
    values = []
    for more in ([], chat):
        output = ["--output", str(tmp_path / f"{len(more)}.json")]
        evaluated = evaluate([*shared, *more, *output])
        probed = probe([*shared, *more, "--output", str(tmp_path / f"probe-{len(more)}.json")])
        for result in (evaluated, probed):
            assert (result["data"].items() >= told.items()) is bool(more)
        values.append(probed["summary"]["none"]["sequence"]["mean"])
    assert values[0] != values[1]
    # Lines of one evaluation are not those of the other.
    with pytest.raises(ValueError, match="system_prompt"):
        evaluate([*shared, "--output", str(tmp_path / f"{len(chat)}.json")])


def test_the_model_card_s_command_has_them(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=1)
    trainer.data = DataArguments(
        dataset_name="gsm8k", system_prompt="Be brief.", chat_template_kwargs='{"a": "b c"}'
    )
    words = shlex.split(run_of(trainer, tmp_path).held_out.command)
    assert words[words.index("--system_prompt") + 1] == "Be brief."
    assert json.loads(words[words.index("--chat_template_kwargs") + 1]) == {"a": "b c"}
