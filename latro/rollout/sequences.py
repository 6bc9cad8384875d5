"""Rationales as token ids, with the answers joined to them; what samples them is an engine.

A completion z ends at an end token, where its decoded text shows the answer template ("The answer
is", by the rule of `latro.rollout.answer_template`), or at the length limit. The sampled token ids
are kept and scored as they are; the answer y = template + answer + end is joined to them as it
tokenizes in context:

    ended by        tokens of z                        the model reads         answer rows
    the template    all, the template's included       x  z  rest of y         the template as
                                                                               sampled, rest of y
    end token       all, the end token included        x  z without it  y      y
    length limit    all                                x  z  y                 y

So the event that ends a rationale is an action of the policy in each case, and every sample's
answer rows spell the same text. y ends as a completion of the policy does: with the token that the
chat template puts behind an assistant's turn, or else with the tokenizer's end token.

A token that spells the end of the template and more (": 5" of "Answer:") is one that z ends with
like an end token: y spells the template anew from there. A template that ends in a word is known to
be whole only by what comes next, "is" or "isn't"; the token that tells is sampled, and is none of
z's: log π(z|x) is that of the words up to the template, and what the policy would have stated is
neither rewarded nor compared with π_0. It leaves out the probability that no letter follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple, Protocol

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from latro.rollout.answer_template import template_pattern
from latro.rollout.chat_template import end_of_turn
from latro.rollout.encoding import TextEncoder


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
    """Every token that ends a completion.

    The tokenizer has one, the generation config may have others, and the chat template puts one
    behind an assistant's turn.
    """
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ids = {tokenizer.eos_token_id}
    ids.update(configured if isinstance(configured, list) else [configured])
    ids.discard(None)
    ids.add(end_of_turn(tokenizer, ids))
    return sorted(i for i in ids if i is not None)


class AnswerJoin:
    """Joins an answer to a sampled rationale, token by token as it reads in context.

    An answer, and a rationale that somebody wrote, are text (`latro.rollout.encoding`): what spells
    a special token in them is not that token. An answer that is one special token and nothing else,
    and none of the tokenizer's roles nor an end, is that token.

    Args:
        tokenizer: any tokenizer; special tokens are never added.
        template: the words an answer begins with, "The answer is".
        eos_token_ids: what ends a completion. What ends an answer is the token that the chat
            template puts behind an assistant's turn; without a template, or one that has such a
            token, the tokenizer's own end, or the first of these.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str, eos_token_ids: Sequence[int]
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template.strip()
        self.pattern = template_pattern(template)
        self.encoder = TextEncoder(tokenizer)
        ends = [end_of_turn(tokenizer, eos_token_ids), tokenizer.eos_token_id, *eos_token_ids]
        self.end_ids = [end for end in ends if end is not None][:1]
        self.eos_token_ids = frozenset([*eos_token_ids, *self.end_ids])
        self._template_is_special = self.encoder.spells_special(self.template)

    def __call__(
        self, prompt_ids: list[int], sample: Sample, answer: str, *, statement: int = 0
    ) -> Rollout:
        """The rollout of one completion; what follows its answer template is dropped.

        `statement`: which of its answer templates that is. The first, where a rationale is sampled;
        in a whole completion the one that states the answer which counts.
        """
        finished = bool(sample.ids) and sample.ids[-1] in self.eos_token_ids
        read = sample.ids[:-1] if finished else sample.ids
        stated = self._find_template(read, statement)
        if stated is None:
            before, opening = self._anchor(prompt_ids + read, self.template)
            return self._rollout(
                prompt_ids,
                sample,
                answer=answer,
                answer_ids=self._answer_ids(before, opening, answer),
                answer_start=len(read),
                finished=finished,
            )
        kept = read[stated.start : stated.whole]
        before = decode(self.tokenizer, kept) if kept else "."
        return self._rollout(
            prompt_ids,
            replace(sample, ids=read[: stated.end]),
            answer=answer,
            answer_ids=kept + self._answer_ids(before, stated.rest, answer),
            answer_start=stated.start,
            finished=True,
        )

    def written(self, prompt_ids: list[int], rationale: str, answer: str) -> Rollout:
        """The rollout of a rationale that somebody wrote; no token of it ends it.

        An answer template in it, and what follows, are dropped.
        """
        before, text = self._anchor(prompt_ids, rationale)
        rollout = self(prompt_ids, Sample(self._ids_after(before, text)), answer)
        return replace(rollout, sampled_ids=rollout.rationale_ids, finished=True)

    def without_ends(self, ids: list[int]) -> list[int]:
        """The ids before the end tokens and the padding that a completion ends with."""
        ends = self.eos_token_ids | {self.tokenizer.pad_token_id}
        count = len(ids)
        while count and ids[count - 1] in ends:
            count -= 1
        return ids[:count]

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
        spelled = decode(self.tokenizer, self._answer_ids(self.template, "", answer)).lstrip()
        # By bisection: whatever stands before them, ids that spell the answer to its end still do.
        first, last = 0, len(ids)
        while first < last:
            middle = (first + last + 1) // 2
            if decode(self.tokenizer, ids[middle:]).endswith(spelled):
                first = middle
            else:
                last = middle - 1
        return first

    def _find_template(self, ids: list[int], statement: int) -> _Stated | None:
        """The tokens that spell the answer template of a statement; None: there are fewer."""
        text = decode(self.tokenizer, ids)
        match = next(islice(self.pattern.finditer(text), statement, None), None)
        if match is None:
            return None
        # By bisection: a longer prefix keeps what a shorter one spells.
        low, high = 1, len(ids)
        while low < high:
            middle = (low + high) // 2
            if decode(self.tokenizer, ids[:middle])[: match.end()] == text[: match.end()]:
                high = middle
            else:
                low = middle + 1
        start = high - 1
        while start > 0 and match[0] not in decode(self.tokenizer, ids[start:high]):
            start -= 1
        if len(decode(self.tokenizer, ids[:high])) == match.end():
            return _Stated(start, high, high, "")
        spelled = len(decode(self.tokenizer, ids[: high - 1]))
        return _Stated(start, high - 1, high, text[spelled : match.end()])

    def _answer_ids(self, before: str, template: str, answer: str) -> list[int]:
        """The tokens of a template, or the rest of one, with the answer, behind `before`."""
        if self.encoder.is_token(answer, but=self.eos_token_ids):
            return self.encoder.after(before, f"{template} {answer}", special=True)
        if template and self._template_is_special:
            opened = self.encoder.after(before, template, special=True)
            return opened + self._ids_after(template, f" {answer}")
        return self._ids_after(before, f"{template} {answer}")

    def _ids_after(self, before: str, text: str) -> list[int]:
        return self.encoder.after(before, text)

    def _anchor(self, ids: list[int], text: str) -> tuple[str, str]:
        """A stand-in for what comes before a sentence that follows `ids`, and that sentence.

        Whether a space opens the sentence is all that matters.
        """
        if decode(self.tokenizer, ids[-4:])[-1:].isspace():
            return "\n", text
        return ".", f" {text}"


class _Stated(NamedTuple):
    """Where sampled tokens spell an answer template."""

    start: int
    """The first of them."""
    whole: int
    """The end of those that spell nothing else behind it."""
    end: int
    """The end of all: the last may spell more, as ": 5" does of "Answer:"."""
    rest: str
    """What `whole` leaves of the template's text."""
