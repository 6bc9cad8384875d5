"""TRL's trainers on sums, with completions that are given and not sampled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from latro.config.training import SMALL_MODEL

EXAMPLES = [
    {"prompt": "Tom has 7 pens. Tom gets 15. How many?", "answer": "22"},
    {"prompt": "Ann has 4 red pens and 5 more. How many?", "answer": "9"},
]
FINISHED = [" 7 + 15 = 22.", " Tom has 7.", " 22", ""], [" 4 + 5 = 9.", " 5", " Ann has 4.", " 9"]


@pytest.fixture(scope="session")
def padding_tokenizer(small_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the model that ships, as TRL wants it."""
    tokenizer = copy.deepcopy(small_tokenizer)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture(scope="session")
def completions(padding_tokenizer: PreTrainedTokenizerBase) -> Callable[..., list[list[int]]]:
    """Return `completions(unfinished)`, token ids of two prompts' four completions each."""

    def make(unfinished: bool) -> list[list[int]]:
        ids = [padding_tokenizer.encode(text) for texts in FINISHED for text in texts]
        end = padding_tokenizer.eos_token_id
        return [row if unfinished and i in (1, 6) else [*row, end] for i, row in enumerate(ids)]

    return make


@pytest.fixture
def make_trl(tmp_path: Path, padding_tokenizer: PreTrainedTokenizerBase) -> Callable[..., Any]:
    """Return `make_trl(kind, model, reward, completions, **settings)`, for one update of SGD.

    `kind` is a trainer of TRL's or made of one. Without completions it samples.
    """
    import trl

    def make(
        kind: type,
        model: Any,
        reward: Any,
        completions: list[list[int]] | None = None,
        *,
        options: dict[str, Any] | None = None,
        rows: list[dict[str, Any]] | None = None,
        tokenizer: Any = padding_tokenizer,
        **settings: Any,
    ) -> Any:
        is_grpo = issubclass(kind, trl.GRPOTrainer)
        config = trl.GRPOConfig if is_grpo else trl.RLOOConfig

        class Given(kind):  # type: ignore[misc, valid-type]
            def _generate_single_turn(self, prompt_ids: Any, *rest: Any, **named: Any) -> Any:
                if completions is None:
                    return super()._generate_single_turn(prompt_ids, *rest, **named)
                return (completions, None) if is_grpo else completions

        settings = {
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_steps": 1,
            "max_completion_length": 16,
            "learning_rate": 1.0,
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "beta": 0.0,
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            "shuffle_dataset": False,
            **settings,
        }
        return Given(
            model,
            reward,
            config(str(tmp_path / "trl"), **settings),
            Dataset.from_list(rows or EXAMPLES),
            processing_class=copy.deepcopy(tokenizer),
            **(options or {}),
        )

    return make


@pytest.fixture
def small_model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(SMALL_MODEL)
