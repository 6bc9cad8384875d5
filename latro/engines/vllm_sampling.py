"""What vLLM is asked to sample: its whole distribution, by a prompt's own seed; and how much."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any, Protocol, runtime_checkable

from latro.rollout.answer_template import stop_strings
from latro.rollout.sequences import RolloutEngine

# All are given, since vLLM takes missing ones from the model's own generation config.
_WHOLE_DISTRIBUTION = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


@runtime_checkable
class _Limited(Protocol):
    """An engine that takes fewer tokens per sequence than the model may."""

    def check_length(self, longest: int) -> None:
        """Raise ValueError where it takes less than `longest` tokens."""


def check_length(engine: RolloutEngine, longest: int) -> None:
    """Raise ValueError where an engine takes less than `longest` tokens per sequence.

    That is asked for a whole dataset before anything is sampled, since the longest prompt of all
    may come late.
    """
    if isinstance(engine, _Limited):
        engine.check_length(longest)


def sampling(
    *,
    num_samples: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    template: str | None,
    eos_token_ids: Sequence[int],
) -> dict[str, Any]:
    """Return the settings of one prompt's completions, as requests and `SamplingParams` name them.

    The arguments are those of `RolloutEngine.generate`, and the tokens that end a completion.
    """
    return {
        "n": num_samples,
        "max_tokens": max_new_tokens,
        "temperature": temperature,
        # vLLM seeds sample j with seed + j, so neighbouring seeds would share their draws: hash
        # the seed.
        "seed": Random(seed).getrandbits(62),
        "stop": [] if template is None else stop_strings(template),
        "stop_token_ids": list(eos_token_ids),
        "skip_special_tokens": False,
        "logprobs": 0,
    } | _WHOLE_DISTRIBUTION
