"""Samples and sequences as token ids, and the protocol of what samples them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from latro.rollout.chat_template import end_of_turn


@dataclass(frozen=True)
class Sample:
    """One completion as an engine returns it."""

    ids: list[int]
    """Token ids, including the token or tokens that ended the completion."""
    logp: list[float] | None = None
    """Log-probability of each id in nats, as the engine computed it at the sampling temperature;
    None where the engine reports none."""


Progress = Callable[[int, int], None]
"""Told, as an engine samples, the tokens since the last time, and how many rows go on."""


class RolloutEngine(Protocol):
    """Samples completions of prompts."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_samples: int,
        max_new_tokens: int,
        temperature: float,
        seeds: Sequence[int],
        template: str | None = None,
        progress: Progress | None = None,
    ) -> list[list[Sample]]:
        """Return `num_samples` completions of each prompt, drawn from the whole distribution.

        Args:
            prompts: token ids; no prompt is empty.
            num_samples: number of completions per prompt.
            max_new_tokens: the length limit of a completion.
            temperature: of sampling; 0 takes the likeliest token.
            seeds: one per prompt, from 0 to 2⁶³ − 1.
            template: if given, a completion also ends with the token that completes this text.
            progress: told how the call goes.
        """
        ...

    def update_weights(
        self, model: PreTrainedModel, step: int, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Take over the policy's weights after optimiser step number `step`.

        `weights`: the whole state dict, where the model itself holds only a shard of it.
        """
        ...


@dataclass(frozen=True)
class Rollout:
    """One prompt, one sampled rationale and the answer joined to it, as token ids."""

    prompt_ids: list[int]
    sampled_ids: list[int]
    """The rationale z with the token or tokens that ended it; log π(z|x) is the sum over these."""
    answer_ids: list[int]
    """The answer y; log π(y|x⊕z) is the sum over these."""
    answer_start: int
    """Number of sampled tokens that stand before y."""
    finished: bool
    """False where the length limit ended the rationale."""
    sampled_logp: list[float] | None = None
    """Log-probability of each sampled id in nats, as the engine computed it, if it reports them."""
    plain: bool = False
    """Whether this is a plain answer, joined to the prompt without a rationale: it is scored beside
    its group's sequences, and is not one of them."""
    own_start: int = 0
    """Index in `answer_ids` of the first own token, one that holds a character of the answer
    itself; the template's tokens stand before it."""
    own_end: int | None = None
    """Index in `answer_ids` behind the last own token, where the end token stands; None: the end of
    y."""

    @property
    def branch_ids(self) -> list[int]:
        """Return what the model reads after the prompt: z and y without y's last token."""
        return self.sampled_ids[: self.answer_start] + self.answer_ids[:-1]

    @property
    def input_ids(self) -> list[int]:
        """Return the token ids that the model reads."""
        return self.prompt_ids + self.branch_ids

    @property
    def rationale_ids(self) -> list[int]:
        """Return z without the token or tokens that ended it."""
        return self.sampled_ids[: self.answer_start]

    @property
    def own_rows(self) -> range:
        """Return the indices in `answer_ids` of the answer's own tokens."""
        return range(len(self.answer_ids))[self.own_start : self.own_end]


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the exact text of token ids, with special tokens and all spaces."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def decode_batch(tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]]) -> list[str]:
    """Return the texts that `decode` gives for each of several rows."""
    return tokenizer.batch_decode(
        ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of all tokens that end a completion.

    The tokenizer has one, the generation config may have others, and the chat template puts one
    behind an assistant's turn.
    """
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ids = {tokenizer.eos_token_id}
    ids.update(configured if isinstance(configured, list) else [configured])
    ids.discard(None)
    ids.add(end_of_turn(tokenizer, ids))
    return sorted(i for i in ids if i is not None)


def let_generation_end(model: PreTrainedModel, ends: Collection[int]) -> None:
    """Let the model's generation config, which is saved with it, have all tokens of `ends`.

    Otherwise other programs would sample on behind the end that the model was trained to write.
    """
    config = model.generation_config
    if config is None:
        return
    configured = config.eos_token_id
    known = configured if isinstance(configured, list) else [configured]
    if not set(ends) <= set(known):
        config.eos_token_id = [
            *(i for i in known if i is not None),
            *sorted(set(ends) - set(known)),
        ]
