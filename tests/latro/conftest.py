"""Tiny models of real architectures, a BPE tokenizer trained here, a task of a few problems."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from latro import LatroConfig, LatroTrainer
from latro.config.training import SMALL_MODEL
from latro.reporting import callbacks
from latro.rollout.answer_join import AnswerJoin
from latro.rollout.sequences import Rollout, Sample
from latro.tasks import Task
from scripts.make_tiny_model import make_model, make_tokenizer
from tests.latro.fake_vllm import FakeVllm
from tests.warm_process import no_picture

TEXTS = [
    f"Tom has {a} pens. Tom gets {b}. How many? Tom has {a}+{b}={a + b}. The answer is {a + b}"
    for a in range(2, 40)
    for b in range(2, 20)
]


class Sums(Task):
    """Sums of two numbers, graded by equality."""

    name = "sums"

    def _rows(
        self, split: str, path: Path | None, num_examples: int | None, seed: int
    ) -> list[dict[str, Any]]:
        numbers = random.Random(f"{split} {seed}")
        pairs = [(numbers.randint(2, 39), numbers.randint(2, 19)) for _ in range(num_examples or 8)]
        return [
            {"prompt": f"Tom has {a} pens. Tom gets {b}. How many?", "answer": str(a + b)}
            for a, b in pairs
        ]

    def same(self, predicted: str, answer: str) -> bool:
        return predicted == answer

    def _canonical(self, statement: str, example: Mapping[str, Any]) -> str | None:
        return statement.strip() or None


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer(TEXTS, vocab_size=400)


@pytest.fixture(scope="session")
def small_tokenizer() -> PreTrainedTokenizerBase:
    """Return the tokenizer of the model that ships."""
    return AutoTokenizer.from_pretrained(SMALL_MODEL)


@pytest.fixture(scope="session")
def tiny(tokenizer: PreTrainedTokenizerBase) -> Callable[..., PreTrainedModel]:
    """Return `tiny(architecture, **options)`, which makes a fresh model for `tokenizer`."""

    def build(architecture: str = "llama", **options: Any) -> PreTrainedModel:
        return make_model(architecture, tokenizer, **options)

    return build


@pytest.fixture
def task() -> Task:
    return Sums()


@pytest.fixture
def dataset(task: Task) -> Dataset:
    return task.load("train")


@pytest.fixture(scope="session")
def rollouts(tokenizer: PreTrainedTokenizerBase) -> Callable[..., list[list[Rollout]]]:
    """Return a maker of ragged groups with every ending: template, end token, length limit."""

    def build(num_groups: int, num_generations: int, seed: int = 0) -> list[list[Rollout]]:
        numbers = random.Random(seed)
        join = AnswerJoin(tokenizer, "The answer is", [tokenizer.eos_token_id])
        groups = []
        for _ in range(num_groups):
            prompt = tokenizer.encode(f"Tom has {numbers.randint(2, 39)} pens. How many?")
            group = []
            for index in range(num_generations):
                text = " Tom has" * numbers.randint(0, 6) + f" {numbers.randint(2, 60)}"
                ending = ("template", "eos", "length", "empty")[index % 4]
                ids = {
                    "template": tokenizer.encode(f"{text}. The answer is"),
                    "eos": [*tokenizer.encode(text), tokenizer.eos_token_id],
                    "length": tokenizer.encode(text),
                    "empty": [tokenizer.eos_token_id],
                }[ending]
                group.append(join(prompt, Sample(ids), str(numbers.randint(2, 99))))
            groups.append(group)
        return groups

    return build


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out pictures, which take longer than a tiny run; `test_callbacks.py` tests them."""
    monkeypatch.setattr(callbacks, "draw_progress", no_picture)


@pytest.fixture
def make_trainer(
    tiny: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    dataset: Dataset,
    tmp_path: Path,
) -> Callable[..., LatroTrainer]:
    """Return `make_trainer(model=None, ref_model=None, **settings)` on the toy task."""

    def make(
        model: PreTrainedModel | None = None,
        ref_model: PreTrainedModel | None = None,
        train_dataset: Dataset = dataset,
        **settings: Any,
    ) -> LatroTrainer:
        settings = {
            "output_dir": str(tmp_path / "run"),
            "num_generations": 4,
            "max_completion_length": 6,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "max_steps": 4,
            "disable_tqdm": True,
            "save_strategy": "no",
            # Tests compare several trainings in one folder.
            "overwrite_output_dir": True,
            **settings,
        }
        return LatroTrainer(
            tiny() if model is None else model,
            LatroConfig(**settings),
            train_dataset,
            tokenizer,
            task,
            eval_dataset=dataset,
            ref_model=ref_model,
        )

    return make


@pytest.fixture
def fake(tokenizer: PreTrainedTokenizerBase) -> Iterator[FakeVllm]:
    with FakeVllm(tokenizer) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
