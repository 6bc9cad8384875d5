"""Say in the log when a run begins to lose its rationales, while its reward may still rise.

The likelihood of an answer can rise without better reasoning: the model learns the words that every
answer begins and ends with, and short rationales escape the floor that unfinished ones get. Both
make rationales shorter until nothing is left of them. The metrics looked at are logged in any case.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from latro.config.training import LatroConfig

logger = logging.getLogger(__name__)

UNFINISHED = 0.5
"""Above this share of unfinished rationales, ending early is what most groups reward."""
SHORTENED = 0.5
"""Below this share of the first rationales' length, a change of style is no likely cause."""
CONFIRMATIONS = 2
"""So many log lines in a row must show it, since one update's sample of prompts may be short."""


class CollapseWarnings(TrainerCallback):
    """Warns once of each sign of a collapse; a run that goes on compares with its first line."""

    def __init__(self) -> None:
        self._told: set[Callable[..., str | None]] = set()
        # The first and the last ones that tell of rationales: the history of a long run grows.
        self._lines: list[Mapping[str, float]] = []

    def on_train_begin(
        self, args: LatroConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._told.clear()
        self._lines = [line for line in state.log_history if "rationale_length" in line]

    def on_log(
        self, args: LatroConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or "rationale_length" not in state.log_history[-1]:
            return
        lines = [*self._lines, state.log_history[-1]]
        self._lines = lines[:1] + lines[1:][-CONFIRMATIONS:]
        for sign in (many_unfinished, shorter):
            warning = None if sign in self._told else sign(self._lines, args)
            if warning is not None:
                logger.warning("update %d: %s", state.global_step, warning)
                self._told.add(sign)


def many_unfinished(lines: Sequence[Mapping[str, float]], args: LatroConfig) -> str | None:
    """Return a warning where most rationales are unfinished and are floored for it, or None."""
    share = lines[-1]["unfinished"]
    if share <= UNFINISHED or args.unfinished != "floor":
        return None
    return (
        f"{share:.0%} of the rationales hit the limit of {args.max_completion_length} tokens and "
        "get the lowest reward of their group, so that to be short is what the update teaches; "
        "raise --max_completion_length, or take --unfinished exclude"
    )


def shorter(lines: Sequence[Mapping[str, float]], args: LatroConfig) -> str | None:
    """Return a warning where rationales have become much shorter than at the start, or None."""
    first, last = lines[0], lines[-1]
    length = first["rationale_length"]
    recent = lines[1:][-CONFIRMATIONS:]
    if len(recent) < CONFIRMATIONS:
        return None
    if any(line["rationale_length"] >= SHORTENED * length for line in recent):
        return None
    risen = last["reward"] - first["reward"]
    own = last["reward_own_tokens"] - first["reward_own_tokens"]
    return (
        f"rationales have {last['rationale_length']:.0f} tokens, and had {length:.0f} at the "
        f"start. log π(y|x⊕z) changed by {risen:+.1f} nats, of which {own:+.1f} on the answer's "
        "own tokens and the rest on the template and the end. To keep the rationales, lower "
        "--learning_rate, raise --beta, or first teach the form of answers with latro.sft"
    )
