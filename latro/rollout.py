"""Rationales as token ids, with the answers joined to them; what samples them is an engine.

A completion z ends at the end-of-sequence token, where its decoded text shows the answer template
("The answer is"), or at the length limit. The sampled token ids are kept and scored as they are;
the answer y = template + answer + end-of-sequence is joined to them as it tokenizes in context:

    ended by        tokens of z                        the model reads         answer rows
    the template    all, the template's included       x  z  rest of y         the template as
                                                                               sampled, rest of y
    end of seq.     all, the end token included        x  z without it  y      y
    length limit    all                                x  z  y                 y

So the event that ends a rationale is an action of the policy in each case, and every sample's
answer rows spell the same text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sample:
    """One completion, as an engine returns it."""

    ids: list[int]
    """Token ids, with the token or tokens that ended it."""
    logp: list[float] | None = None
    """Log-probability of each id, in nats, as the engine computed it at the temperature of
    sampling; None where it does not tell."""


class RolloutEngine(Protocol):
    """What samples completions of prompts."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_samples: int,
        max_new_tokens: int,
        temperature: float,
        seeds: Sequence[int],
        template: str | None = None,
    ) -> list[list[Sample]]:
        """`num_samples` completions of each prompt from the policy's whole distribution.

        Args:
            prompts: token ids, none empty.
            num_samples: completions of one prompt.
            max_new_tokens: the length limit.
            temperature: 0 takes the likeliest token.
            seeds: one per prompt; from 0 to 2⁶³ − 1.
            template: a completion also ends with the token that completes this text.
        """
        ...

    def update_weights(
        self, model: PreTrainedModel, step: int, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Called with the policy after the optimiser's step number `step`.

        `weights`: the state dict to take for the model's own, where that is in shards.
        """
        ...


@dataclass(frozen=True)
class Rollout:
    """One prompt, one sampled rationale and the answer joined to it, as token ids."""

    prompt_ids: list[int]
    sampled_ids: list[int]
    """The rationale z with the token or tokens that ended it: what log π(z|x) sums over."""
    answer_ids: list[int]
    """The answer y: what log π(y|x⊕z) sums over."""
    answer_start: int
    """How many sampled tokens stand before y."""
    finished: bool
    """False where the length limit ended the rationale."""
    sampled_logp: list[float] | None = None
    """Log-probability of each sampled id as the engine computed it, in nats, where it tells."""
    plain: bool = False
    """The answer joined to the prompt without a rationale: scored beside the sequences of its
    group, and none of them."""
    own_start: int = 0
    """Where in `answer_ids` the answer's own tokens begin, those that hold a character of the
    answer itself; the template's tokens stand before them."""
    own_end: int | None = None
    """Where in `answer_ids` the answer's own tokens end; the end token stands after them. None:
    where y ends."""

    @property
    def branch_ids(self) -> list[int]:
        """What the model reads after the prompt: all but y's last token, which nothing follows."""
        return self.sampled_ids[: self.answer_start] + self.answer_ids[:-1]

    @property
    def input_ids(self) -> list[int]:
        """What the model reads."""
        return self.prompt_ids + self.branch_ids

    @property
    def rationale_ids(self) -> list[int]:
        """z without the token or tokens that ended it."""
        return self.sampled_ids[: self.answer_start]

    @property
    def own_rows(self) -> range:
        """The indices in `answer_ids` of the answer's own tokens."""
        return range(len(self.answer_ids))[self.own_start : self.own_end]


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of token ids to the letter: nothing skipped, no spaces tidied."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def decode_batch(tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]]) -> list[str]:
    """`decode` for many rows."""
    return tokenizer.batch_decode(
        ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: the tokenizer's and those of the generation config."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ids = {tokenizer.eos_token_id}
    ids.update(configured if isinstance(configured, list) else [configured])
    return sorted(i for i in ids if i is not None)


class AnswerJoin:
    """Joins an answer to a sampled rationale, token by token as it reads in context.

    Args:
        tokenizer: any tokenizer; special tokens are never added.
        template: the words an answer begins with, "The answer is".
        eos_token_ids: what ends a completion; the first of the tokenizer's own ends an answer.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str, eos_token_ids: Sequence[int]
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.eos_token_ids = frozenset(eos_token_ids)
        end = tokenizer.eos_token_id
        if end is None and eos_token_ids:
            end = eos_token_ids[0]
        self.end_ids = [] if end is None else [end]

    def __call__(self, prompt_ids: list[int], sample: Sample, answer: str) -> Rollout:
        """The rollout of one completion; what follows its first answer template is dropped."""
        sampled_ids = sample.ids
        span = self._find_template(sampled_ids)
        if span is not None:
            start, end = span
            sampled_ids = sampled_ids[:end]
            spelled = decode(self.tokenizer, sampled_ids[start:])
            rest = "" if spelled[-1].isspace() else " "
            answer_ids = sampled_ids[start:] + self._ids_after(self.template, rest + answer)
            return self._rollout(
                prompt_ids,
                replace(sample, ids=sampled_ids),
                answer=answer,
                answer_ids=answer_ids,
                answer_start=start,
                finished=True,
            )

        finished = bool(sampled_ids) and sampled_ids[-1] in self.eos_token_ids
        start = len(sampled_ids) - finished
        answer_ids = self._ids_behind(prompt_ids + sampled_ids[:start], f"{self.template} {answer}")
        return self._rollout(
            prompt_ids,
            sample,
            answer=answer,
            answer_ids=answer_ids,
            answer_start=start,
            finished=finished,
        )

    def written(self, prompt_ids: list[int], rationale: str, answer: str) -> Rollout:
        """The rollout of a rationale that somebody wrote; no token of it ends it.

        An answer template in it, and what follows, are dropped.
        """
        ids = self._ids_behind(prompt_ids, rationale)
        rollout = self(prompt_ids, Sample(ids), answer)
        return replace(rollout, sampled_ids=rollout.rationale_ids, finished=True)

    def _rollout(
        self,
        prompt_ids: list[int],
        sample: Sample,
        *,
        answer: str,
        answer_ids: list[int],
        answer_start: int,
        finished: bool,
    ) -> Rollout:
        """The rollout of a sample that ends with its rationale; `answer_ids` have no end yet."""
        return Rollout(
            prompt_ids,
            sample.ids,
            answer_ids + self.end_ids,
            answer_start,
            finished,
            None if sample.logp is None else sample.logp[: len(sample.ids)],
            own_start=self._own_start(answer_ids, answer),
            own_end=len(answer_ids),
        )

    def _own_start(self, ids: list[int], answer: str) -> int:
        """Return the index of the first of `ids` that holds a character of `answer`, their end.

        A token that spells the end of the template together with the beginning of the answer is the
        answer's; a token that is nothing but the space between them is not.
        """
        # As the tokenizer spells it, which may normalise characters.
        spelled = decode(self.tokenizer, self._ids_after(self.template, f" {answer}")).lstrip()
        # By bisection: whatever stands before them, ids that spell the answer to its end still do.
        first, last = 0, len(ids)
        while first < last:
            middle = (first + last + 1) // 2
            if decode(self.tokenizer, ids[middle:]).endswith(spelled):
                first = middle
            else:
                last = middle - 1
        return first

    def _find_template(self, ids: list[int]) -> tuple[int, int] | None:
        """The tokens [start, end) that spell the first template, or None."""
        if self.template not in decode(self.tokenizer, ids):
            return None
        # Both ends by bisection: a longer prefix keeps the match, and so does a longer suffix.
        low, high = 1, len(ids)
        while low < high:
            middle = (low + high) // 2
            if self.template in decode(self.tokenizer, ids[:middle]):
                high = middle
            else:
                low = middle + 1
        end = high
        start = end - 1
        while start > 0 and self.template not in decode(self.tokenizer, ids[start:end]):
            start -= 1
        return start, end

    def _ids_behind(self, ids: list[int], text: str) -> list[int]:
        """The tokens of a sentence that follows `ids`, with a space where there is none."""
        before = decode(self.tokenizer, ids[-4:])
        # A stand-in for what comes before: whether a space opens the text is all that matters.
        anchor, space = ("\n", "") if before[-1:].isspace() else (".", " ")
        return self._ids_after(anchor, f"{space}{text}")

    def _ids_after(self, before: str, text: str) -> list[int]:
        """The tokens of `text` where `before` stands in front of it."""
        encode = self.tokenizer.encode
        prefix = encode(before, add_special_tokens=False)
        whole = encode(before + text, add_special_tokens=False)
        if whole[: len(prefix)] == prefix and len(whole) > len(prefix):
            return whole[len(prefix) :]
        # The two merge across the border; the text on its own is the nearest that keeps the ids.
        return encode(text, add_special_tokens=False)
