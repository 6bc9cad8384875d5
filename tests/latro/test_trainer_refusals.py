from __future__ import annotations

import pytest
from datasets import Dataset
from transformers import TrainingArguments

from latro import LatroConfig, LatroTrainer


def test_exact_kl_wants_a_reference_that_can_be_compared(make_trainer, tiny):
    with pytest.raises(ValueError, match="ref_model: expected the logit scale of the policy"):
        make_trainer(tiny("cohere", logit_scale=0.5), tiny("cohere", logit_scale=0.25), kl="exact")


def test_a_reference_that_is_no_other_model_is_refused(make_trainer, tiny):
    model = tiny()
    with pytest.raises(ValueError, match="ref_model: expected a model with weights of its own"):
        make_trainer(model, model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match=r"ref_model: expected the 395 tokens .* a head of 300"):
        make_trainer(tiny(), tiny(vocab_size=300))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(make_trainer, tiny):
    with pytest.raises(
        ValueError, match=r"processing_class: the tokenizer has 395 tokens but .* has 300"
    ):
        make_trainer(tiny(vocab_size=300))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"prompt": ["a"]}, "columns prompt and answer"),
        ({"prompt": [], "answer": []}, "at least one row"),
        ({"prompt": ["How?", "How?"], "answer": ["5", " "]}, "row 1: expected a non-empty answer"),
        ({"prompt": [""], "answer": ["5"]}, "row 0: the prompt has no tokens"),
        ({"prompt": ["pens " * 2000], "answer": ["5"]}, "but the model has 1024"),
    ],
)
def test_bad_rows_are_refused_before_training(make_trainer, rows, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(train_dataset=Dataset.from_dict(rows))


def test_weights_that_zero_3_sharded_as_they_were_loaded_are_refused(make_trainer, tiny):
    model = tiny()
    # What tells such a weight, which is empty.
    model.get_input_embeddings().weight.ds_id = 0
    with pytest.raises(ValueError, match="model: expected whole weights, which the trainer shards"):
        make_trainer(model)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("model", "org/model", "model: expected a PreTrainedModel or PeftModel, got str"),
        ("args", TrainingArguments(), "args: expected a LatroConfig, got TrainingArguments"),
        ("processing_class", None, "processing_class: expected the model's tokenizer, got None"),
        ("task", "gsm8k", "task: expected a task, such as .*, got str"),
        ("train_dataset", [{"prompt": "a", "answer": "5"}], "train_dataset: .* got list"),
        ("eval_dataset", {"prompt": ["a"], "answer": ["5"]}, "eval_dataset: .* got dict"),
    ],
)
def test_arguments_of_another_kind_are_named(tiny, tokenizer, task, argument, value, message):
    given = {
        "model": tiny(),
        "args": LatroConfig(),
        "train_dataset": None,
        "processing_class": tokenizer,
        "task": task,
    }
    with pytest.raises(TypeError, match=message):
        LatroTrainer(**{**given, argument: value})


@pytest.mark.parametrize(
    "prompts", [["How?", None], [1, 2], [[{"role": "user"}]], [[{"role": "user", "content": None}]]]
)
def test_a_prompt_of_another_kind_is_named_with_its_row(make_trainer, prompts):
    rows = Dataset.from_list([{"prompt": prompt, "answer": "5"} for prompt in prompts])
    with pytest.raises(ValueError, match=r"train_dataset: row \d: expected a string, or messages"):
        make_trainer(train_dataset=rows)


def test_a_model_without_weights_to_train_is_refused(make_trainer, tiny):
    with pytest.raises(ValueError, match="model: none of its weights requires a gradient"):
        make_trainer(tiny().requires_grad_(False))


def test_half_precision_that_a_cpu_would_leave_out_is_refused(make_trainer):
    with pytest.raises(ValueError, match="fp16: expected bf16, or neither, on a CPU"):
        make_trainer(fp16=True, use_cpu=True)


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({"eval_on_start": True}, "eval_on_start=True"),
        ({"eval_strategy": "steps"}, "eval_strategy='steps'"),
    ],
)
def test_evaluations_without_rows_are_refused_before_anything_is_deleted(
    tiny, tokenizer, task, dataset, tmp_path, settings, asked
):
    """The run before is there still; its files were deleted before the first evaluation failed."""
    (tmp_path / "checkpoint-3").mkdir()
    args = LatroConfig(str(tmp_path), overwrite_output_dir=True, **settings)
    with pytest.raises(ValueError, match=rf"^eval_dataset: .* with {asked}, got None"):
        LatroTrainer(tiny(), args, dataset, tokenizer, task).train()
    assert (tmp_path / "checkpoint-3").exists()


def test_no_callbacks_may_be_given_as_none(tiny, tokenizer, task, tmp_path):
    def callbacks_of(**given):
        args = LatroConfig(output_dir=str(tmp_path / "run"))
        trainer = LatroTrainer(tiny(), args, None, tokenizer, task, **given)
        return [type(callback) for callback in trainer.callback_handler.callbacks]

    assert callbacks_of(callbacks=None) == callbacks_of()


def test_rows_that_would_all_be_dropped_are_refused(make_trainer):
    trainer = make_trainer(per_device_train_batch_size=16, dataloader_drop_last=True)
    with pytest.raises(ValueError, match=r"dataloader_drop_last: expected .* 16 rows, got 8 rows"):
        trainer.train()


@pytest.mark.parametrize("name", ["compute_loss", "evaluation_loop", "prediction_step"])
def test_a_subclass_may_not_override_what_is_never_called(tiny, tokenizer, task, tmp_path, name):
    kind = type("Mine", (LatroTrainer,), {name: lambda self, *args, **kwargs: None})
    with pytest.raises(TypeError, match=rf"^Mine.{name}: expected the Trainer's own, as no update"):
        kind(
            model=tiny(),
            args=LatroConfig(output_dir=str(tmp_path / "run")),
            train_dataset=Dataset.from_dict({"prompt": ["How?"], "answer": ["5"]}),
            processing_class=tokenizer,
            task=task,
        )
    assert not (tmp_path / "run").exists()
