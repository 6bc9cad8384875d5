from __future__ import annotations

import pytest

from latro import LatroConfig
from latro.config.training import SftConfig

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e39])
@pytest.mark.parametrize(
    "name",
    [
        *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
        *("max_grad_norm", "warmup_steps", "num_train_epochs", "eval_delay"),
        *("logging_steps", "save_steps", "eval_steps"),
    ],
)
def test_a_number_that_fp32_does_not_hold_is_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=rf"^{name}: expected a number that fp32 holds.*got "):
        LatroConfig(output_dir=str(tmp_path / "run"), **{"eval_strategy": "steps", name: value})


@pytest.mark.parametrize(
    "kwargs",
    [{"min_lr": INF}, {"deep": [1.0, NAN]}, '{"min_lr": NaN}', '{"a": {"b": Infinity}}'],
)
def test_numbers_inside_of_mappings_are_looked_at(tmp_path, kwargs):
    with pytest.raises(ValueError, match=r"^lr_scheduler_kwargs: .*fp32 holds"):
        SftConfig(output_dir=str(tmp_path), lr_scheduler_kwargs=kwargs)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"learning_rate": -1e-6}, "learning_rate: expected at least 0, got -1e-06"),
        ({"weight_decay": -0.1}, "weight_decay: expected at least 0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm: expected at least 0"),
        ({"adam_beta1": -0.1}, "adam_beta1: expected at least 0"),
        ({"adam_beta1": 1.0}, r"adam_beta1: expected less than 1, got 1\.0"),
        ({"adam_beta2": 1.5}, "adam_beta2: expected less than 1"),
        # A weight whose gradient is 0 would become 0/0.
        ({"adam_epsilon": 0.0}, "adam_epsilon: expected at least 1.17"),
        ({"adam_epsilon": 1e-50}, "adam_epsilon: expected at least 1.17"),
        ({"warmup_steps": -1}, "warmup_steps: expected at least 0"),
        ({"num_train_epochs": -1.0}, "num_train_epochs: expected at least 0"),
        ({"eval_delay": -1}, "eval_delay: expected at least 0"),
        ({"seed": -1}, "seed: expected at least 0"),
        ({"seed": 2**32}, "seed: expected less than 4294967296"),
        ({"data_seed": -1}, "data_seed: expected at least 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: expected at least 1"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size: expected at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: expected at least 1"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers: expected at least 0"),
        ({"num_eval_examples": 0}, "num_eval_examples: expected at least 1"),
        ({"num_completions_to_print": -1}, "num_completions_to_print: expected at least 0"),
        ({"logging_steps": 0}, "logging_steps: expected more than 0"),
        ({"logging_steps": -3}, "logging_steps: expected more than 0"),
        ({"save_steps": 0}, "save_steps: expected more than 0"),
        ({"eval_strategy": "steps", "eval_steps": -2}, "eval_steps: expected more than 0"),
        (
            {"load_best_model_at_end": True, "save_strategy": "no"},
            "eval_strategy: expected steps or epoch, since the best model",
        ),
        ({"save_strategy": "best"}, "eval_strategy: expected steps or epoch"),
    ],
)
def test_a_number_out_of_its_range_is_named(tmp_path, setting, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        LatroConfig(output_dir=str(tmp_path), **setting)


def test_text_is_no_number(tmp_path):
    with pytest.raises(TypeError, match=r"^learning_rate: expected a number, got str"):
        LatroConfig(output_dir=str(tmp_path), learning_rate="1e-6")


def test_the_ends_of_ranges_are_taken(tmp_path):
    args = LatroConfig(
        output_dir=str(tmp_path),
        learning_rate=0.0,
        max_grad_norm=0.0,
        adam_beta1=0.0,
        warmup_steps=0.1,
        data_seed=0,
        eval_strategy="steps",
    )
    assert args.eval_steps == args.logging_steps
