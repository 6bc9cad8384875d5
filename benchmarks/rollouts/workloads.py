"""What `rollout.py` samples: models, prompts, and how long completions are."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.updates.problem import (
    CPU,
    QUICK,
    ModelSize,
    Setting,
    StepProblem,
    stops_by_chance,
)
from latro.config.model import ModelArguments
from latro.loading import load_model
from studies.real_model.prepare import find_gguf

SMOLLM2 = ModelSize(hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3)
WORKLOADS = ("smollm2", "step")


@dataclass(frozen=True)
class Workload:
    """Prompts of one model, K completions each.

    Attributes:
        name: in tables.
        weights: where the weights are from.
        model: in fp32.
        tokenizer: has the end token, if a completion may end.
        setting: sizes; completions end at lengths drawn from its `rationale`, or all at its end.
    """

    name: str
    weights: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    setting: Setting

    @property
    def prompts(self) -> list[list[int]]:
        """The token ids of the prompts, drawn at random."""
        drawn = random.Random(0)
        s = self.setting
        return [[drawn.randrange(5, s.V) for _ in range(s.P)] for _ in range(s.G)]

    @property
    def end(self) -> int | None:
        """The token that ends a completion; None: only the length does."""
        return self.tokenizer.eos_token_id

    @property
    def lengths(self) -> list[int]:
        """The lengths of a prompt's completions, for who cannot draw them."""
        return self.setting.lengths

    @contextmanager
    def ending(self, model: PreTrainedModel) -> Iterator[None]:
        """Within it, completions of `model`, a copy of ours, end at lengths as they should."""
        if self.end is None:
            yield
            return
        with stops_by_chance(model, self.setting, self.end):
            yield


def make_workload(name: str, device: torch.device, *, quick: bool) -> Workload:
    """Make a workload of `WORKLOADS`; a quick one is tiny."""
    if name == "step":
        return _drawn(QUICK if quick else CPU, device)
    if quick:
        longest = QUICK.rationale[1]
        tiny = replace(QUICK, G=4, K=8, rationale=(longest, longest))
        return _full(tiny, device, real=False)
    setting = Setting(SMOLLM2, G=4, K=8, P=48, rationale=(64, 64), A=8, V=49152)
    return _full(setting, device, real=True)


def _drawn(setting: Setting, device: torch.device) -> Workload:
    """Return the rollout of the step benchmark: completions end at lengths that are drawn."""
    problem = StepProblem(setting, device)
    return Workload(
        name="step",
        weights="random",
        model=problem.models()[0].eval(),
        tokenizer=problem.tokenizer,
        setting=setting,
    )


def _full(setting: Setting, device: torch.device, *, real: bool) -> Workload:
    """Return completions that all have the same length, of SmolLM2 where it is installed."""
    problem = StepProblem(setting, device)
    model, tokenizer, weights = problem.models()[0], problem.tokenizer, "random"
    file = find_gguf() if real and find_spec("gguf") else None
    if file is not None:
        arguments = ModelArguments(model_name_or_path=str(file), dtype="float32")
        model, tokenizer = load_model(arguments)
        weights = "SmolLM2-135M-Instruct"
    # Nothing but the length ends a completion.
    tokenizer.eos_token = tokenizer.chat_template = None
    model.generation_config.eos_token_id = None
    return Workload(
        name="smollm2",
        weights=weights,
        model=model.to(device).eval(),
        tokenizer=tokenizer,
        setting=setting,
    )
