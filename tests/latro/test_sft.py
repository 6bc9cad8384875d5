"""`SftTrainer` and its command."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from latro import SftConfig, SftTrainer
from latro.rollout.answer_join import AnswerJoin
from latro.rollout.prompts import encode_prompt
from latro.rollout.sequences import decode
from latro.sft import sft

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"


@pytest.fixture
def worked(dataset) -> Dataset:
    """Return the toy problems with solutions of different lengths."""
    texts = [f"Tom gets {i}. " * (i % 3) + f"He has {i}." for i in range(len(dataset))]
    return dataset.add_column("rationale", texts)


@pytest.fixture
def make_sft(tiny, tokenizer, task, worked, tmp_path):
    """`make_sft(model=None, train_dataset=worked, **settings)` on the toy task."""

    def make(model=None, train_dataset=worked, **settings) -> SftTrainer:
        settings = {
            "output_dir": str(tmp_path / "run"),
            "max_completion_length": 6,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "max_steps": 4,
            "disable_tqdm": True,
            "save_strategy": "no",
            **settings,
        }
        return SftTrainer(
            tiny() if model is None else model,
            SftConfig(**settings),
            train_dataset,
            tokenizer,
            task,
            eval_dataset=worked,
        )

    return make


def labelled(tokenizer, rows, target):
    """Ids and labels of rows, padded: by the tokenizer alone, of texts that tokenize in parts."""
    ids, labels = [], []
    for row in rows:
        prompt = encode_prompt(tokenizer, row["prompt"])
        text = f" The answer is {row['answer']}"
        if target == "rationale":
            text = f" {row['rationale']}{text}"
        tail = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        ids.append(torch.tensor(prompt + tail))
        labels.append(torch.tensor([-100] * len(prompt) + tail))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(ids, batch_first=True), pad(labels, batch_first=True, padding_value=-100)


@pytest.mark.parametrize("target", ["rationale", "answer"])
@pytest.mark.parametrize("token_budget", [10**6, 60, 1])
def test_gradients_equal_autograd_through_whole_logits(
    make_sft, tiny, tokenizer, worked, target, token_budget
):
    model = tiny(seed=1).double()
    reference = copy.deepcopy(model)
    trainer = make_sft(model, target=target, token_budget=token_budget, backend="reference")
    trainer.state.max_steps = 1
    # Two accumulation steps of unlike lengths are one mean.
    steps = [trainer.data_collator(list(worked)[:3]), trainer.data_collator(list(worked)[3:4])]
    batches, count = trainer.get_batch_samples(iter(steps), 2, trainer.args.device)
    loss = sum(trainer.training_step(model, batch, count) for batch in batches)

    ids, labels = labelled(tokenizer, list(worked)[:4], target)
    logits = reference(input_ids=ids).logits[:, :-1]
    expected = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    expected.backward()
    own = reference(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(expected, own.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=0)
    assert count == (labels != -100).sum()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        # transformers' norms compute in fp32 even in an fp64 model; all else here is fp64.
        scale = theirs.grad.abs().max()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-6 * scale, msg=name)


@pytest.mark.parametrize("target", ["rationale", "answer"])
def test_it_trains_and_logs(make_sft, target, tmp_path):
    trainer = make_sft(target=target, max_steps=12)
    trainer.train()
    entries = [e for e in trainer.state.log_history if "loss" in e]
    assert entries[-1]["loss"] < entries[0]["loss"] - 1
    assert entries[-1]["answer_logp"] > entries[0]["answer_logp"]
    assert all(e["tokens_per_second"] > 0 for e in entries)
    assert (tmp_path / "run" / "progress.png").stat().st_size > 0
    assert 0 <= trainer.evaluate()["eval_accuracy_greedy"] <= 1


def test_written_rationales_read_as_text(tokenizer):
    join = AnswerJoin(tokenizer, "The answer is", [tokenizer.eos_token_id])
    prompt = tokenizer.encode("How many?")
    rollout = join.written(prompt, "Tom has 5. The answer is 6. More.", "7")
    text = decode(tokenizer, prompt + rollout.branch_ids)
    assert text == "How many? Tom has 5. The answer is 7"
    # The template is a target once, though the text had one of its own.
    assert rollout.answer_start == len(rollout.sampled_ids)
    assert rollout.answer_ids[-1] == tokenizer.eos_token_id
    line = join.written(tokenizer.encode("How many?\n"), "Tom has 5.", "7")
    assert decode(tokenizer, line.branch_ids) == "Tom has 5. The answer is 7"


def test_a_run_that_goes_on_ends_with_the_same_bits(make_sft, tiny, tmp_path):
    straight, resumed = tiny(), tiny()
    saving = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    make_sft(straight, **saving).train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    make_sft(resumed, **saving).train(resume_from_checkpoint=str(checkpoint))
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_data_without_rationales_is_named(make_sft, dataset, worked, tmp_path):
    with pytest.raises(ValueError, match=r"target: .* no worked rationales .* --target answer"):
        make_sft(train_dataset=dataset)
    make_sft(train_dataset=dataset, target="answer", output_dir=str(tmp_path / "other"))
    rows = [{**row, "rationale": " " if i == 3 else "So."} for i, row in enumerate(worked)]
    with pytest.raises(ValueError, match="train_dataset: row 3: expected a rationale, got ' '"):
        make_sft(train_dataset=Dataset.from_list(rows))
    assert not (tmp_path / "run").exists()


def test_rows_that_do_not_fit_are_named(make_sft, tiny, worked, tmp_path):
    rows = [{**row, "rationale": "Tom gets 5. " * (i * 9)} for i, row in enumerate(worked, 1)]
    model = tiny(max_position_embeddings=64)
    with pytest.raises(ValueError, match=r"train_dataset: row \d: prompt, .* model has 64; drop"):
        make_sft(model, train_dataset=Dataset.from_list(rows))
    assert not (tmp_path / "run").exists()


def test_unknown_target():
    with pytest.raises(ValueError, match="target: expected one of rationale, answer, got 'x'"):
        SftConfig(target="x")


OPTIONS = (
    *("--num_train_examples", "16", "--num_eval_examples", "3", "--max_completion_length", "8"),
    *("--disable_tqdm", "true", "--use_cpu", "true", "--max_steps", "3", "--eval_strategy", "no"),
)


def test_two_processes_end_with_the_weights_of_one(tmp_path, warm):
    one, two = tmp_path / "one", tmp_path / "two"
    sft([*OPTIONS, "--per_device_train_batch_size", "4", "--output_dir", str(one)])
    arguments = (
        *(*OPTIONS, "--per_device_train_batch_size", "2"),
        # A budget that cuts the rows of the two into unequal numbers of pieces.
        *("--token_budget", "110", "--output_dir", two),
    )
    warm.run_together("latro.sft", arguments, tmp_path / "printed", processes=2)
    logs = [
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (one, two)
    ]
    for name in ("loss", "answer_logp", "grad_norm", "target_tokens"):
        ours, theirs = ([e[name] for e in log if name in e] for log in logs)
        assert len(ours) == 3
        assert ours == pytest.approx(theirs, rel=1e-4), name
    a, b = (load_file(path / "model.safetensors") for path in (one, two))
    for name, tensor in a.items():
        # Adam divides a gradient by its size, so a last bit of a small one is worth a share of
        # the learning rate: a fiftieth of one step of 1e-3 is allowed.
        torch.testing.assert_close(tensor, b[name], rtol=0, atol=2e-5, msg=name)


def test_arc_has_no_rationales(tmp_path):
    folder = DATA / "arc_challenge"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: the data set is not part of the repository")
    options = ("--dataset_name", "arc_challenge", "--dataset_path", str(folder))
    with pytest.raises(ValueError, match=r"target: arc_challenge has no worked rationales"):
        sft([*OPTIONS, *options, "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_gsm8k_has_rationales_that_fit_its_prompts(tiny, tmp_path, tokenizer):
    folder = DATA / "gsm8k"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: the data set is not part of the repository")
    tiny(max_position_embeddings=2048).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    sft(
        [
            *("--model_name_or_path", str(tmp_path / "model"), "--dataset_name", "gsm8k"),
            *("--dataset_path", str(folder), "--output_dir", str(tmp_path / "run"), *OPTIONS),
        ]
    )
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["final"]["eval_answer_logp"] != results["base"]["eval_answer_logp"]
