"""Answers joined to rationales, token by token.

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
answer rows spell the same text. Where the model thinks in a block of its own
(`latro.rollout.frame`), what closes the block stands in the template's place: it ends z and begins
y, and the template follows it in y, "</think> The answer is 5". y ends as a completion of the
policy does: with the token that the chat template puts behind an assistant's turn, or else with the
tokenizer's end token.

Where one token spells the end of the template and more (": 5" of "Answer: 5"), z ends with that
token as with an end token, and y spells the rest of the template again. A template that ends in a
word is known to be whole only by the next token ("is", or "isn't"). That token is sampled but does
not belong to z: log π(z|x) covers the words up to the template, and what the policy would have
stated is neither rewarded nor compared with π_0. So log π(z|x) leaves out the probability that no
letter follows the template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from latro.rollout.answer_template import template_pattern
from latro.rollout.chat_template import end_of_turn
from latro.rollout.frame import Chat, Frame
from latro.rollout.sequences import Rollout, Sample, decode

_MOST_ANSWERS = 256  # whose tokens are kept for the next rationale


class AnswerJoin:
    """Joins an answer to a sampled rationale, token by token as it reads in context.

    Answers and written rationales are text (`latro.rollout.encoding`): a special token spelled in
    them is not read as that token. The exception is an answer that is exactly one special token,
    which has no role in the tokenizer and ends no completion.

    An answer ends with the token that the chat template puts behind an assistant's turn; where
    there is none, with the tokenizer's end token, or else the first of `eos_token_ids`.

    Args:
        tokenizer: any tokenizer; special tokens are never added.
        template: the words that an answer begins with, "The answer is".
        eos_token_ids: the tokens that end a completion.
        chat: what the chat template is given beside a prompt; None: nothing.
        framed: whether prompts are in the chat template's frame.

    Attributes:
        frame: what the chat template puts around a prompt.
        ending: the words that end a rationale: the template, or what closes a model's thoughts.
        opening: the words that y begins with: `ending`, then the template where that is another.
        pattern: matches `ending`.

    Raises:
        ValueError: the template is white space, or the frame cannot be as `chat` asks.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        eos_token_ids: Sequence[int],
        chat: Chat | None = None,
        *,
        framed: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.frame = Frame(tokenizer, chat, framed=framed)
        self.encoder = self.frame.encoder
        self.template = template.strip()
        self.ending, self._behind_ending = self.template, ""
        self.pattern = template_pattern(template)
        thinking = self.frame.thinking
        if thinking is not None:
            self.ending, self._behind_ending = thinking.closing, thinking.behind + self.template
            self.pattern = template_pattern(self.ending)
        self.opening = self.ending + self._behind_ending
        ends = [end_of_turn(tokenizer, eos_token_ids), tokenizer.eos_token_id, *eos_token_ids]
        self.end_ids = [end for end in ends if end is not None][:1]
        self.eos_token_ids = frozenset([*eos_token_ids, *self.end_ids])
        self._opening_is_special = self.encoder.spells_special(self.opening)
        # The K rationales of a prompt have the same answer, and mostly the same words before it.
        self._answer_ids = lru_cache(_MOST_ANSWERS)(self._encode_answer)
        self._own_start = lru_cache(_MOST_ANSWERS)(self._find_own_start)

    def __call__(
        self, prompt_ids: list[int], sample: Sample, answer: str, *, statement: int = 0
    ) -> Rollout:
        """Return the rollout of one completion; what follows the words that end it is dropped.

        `statement` is the index of these words in the completion: 0, the first, for a sampled
        rationale; in a whole completion, the one that states the answer which counts. White space
        around the answer does not count.
        """
        answer = answer.strip()
        finished = bool(sample.ids) and sample.ids[-1] in self.eos_token_ids
        read = sample.ids[:-1] if finished else sample.ids
        stated = self._find_ending(read, statement)
        if stated is None:
            before, opening = self._anchor(prompt_ids, read, self.opening)
            return self._rollout(
                prompt_ids,
                sample,
                answer=answer,
                answer_ids=[*self._answer_ids(before, opening, answer)],
                answer_start=len(read),
                finished=finished,
            )
        kept = read[stated.start : stated.whole]
        before = decode(self.tokenizer, kept) if kept else "."
        return self._rollout(
            prompt_ids,
            replace(sample, ids=read[: stated.end]),
            answer=answer,
            answer_ids=[
                *kept,
                *self._answer_ids(before, stated.rest + self._behind_ending, answer),
            ],
            answer_start=stated.start,
            finished=True,
        )

    def written(self, prompt_ids: list[int], rationale: str, answer: str) -> Rollout:
        """Return the rollout of a written rationale, which has no token that ends it.

        Words in the rationale that would end a sampled one, and all that follows, are dropped.
        """
        thinking = self.frame.thinking
        if thinking is None:
            before, text = self._anchor(prompt_ids, [], rationale)
        else:
            # Thoughts begin right behind what opens their block. They may bring the block's own
            # marks, which would be text where these are special tokens.
            thoughts = rationale.lstrip()
            if thoughts.startswith(thinking.mark):
                thoughts = thoughts.removeprefix(thinking.mark).lstrip()
            before, text = "\n", self.pattern.split(thoughts, maxsplit=1)[0].rstrip()
        rollout = self(prompt_ids, Sample(self._ids_after(before, text)), answer)
        return replace(rollout, sampled_ids=rollout.rationale_ids, finished=True)

    def said(self, completion: str) -> str:
        """Return what a completion says: what stands behind its thoughts, or all without thoughts.

        A completion that never closes its block of thoughts says nothing.
        """
        if self.frame.thinking is None:
            return completion
        closed = self.pattern.search(completion)
        return "" if closed is None else completion[closed.end() :]

    def without_ends(self, ids: list[int]) -> list[int]:
        """Return the ids of a completion without the end tokens and padding at its end."""
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
        """Return the rollout of a sample that ends with z; add the end token to `answer_ids`."""
        return Rollout(
            prompt_ids=prompt_ids,
            sampled_ids=sample.ids,
            answer_ids=answer_ids + self.end_ids,
            answer_start=answer_start,
            finished=finished,
            sampled_logp=None if sample.logp is None else sample.logp[: len(sample.ids)],
            own_start=self._own_start(tuple(answer_ids), answer),
            own_end=len(answer_ids),
        )

    def _find_own_start(self, ids: tuple[int, ...], answer: str) -> int:
        """Return the index of the first of `ids` with a character of `answer`, which ends them.

        A token that spells the end of the template together with the beginning of the answer is the
        answer's; a token that is nothing but the space between them is not.
        """
        # The answer as the tokenizer spells it, since it may normalise characters.
        spelled = decode(self.tokenizer, [*self._answer_ids(self.template, "", answer)]).lstrip()
        # Bisection works: ids that end with the answer's spelling still do with more ids in front.
        first, last = 0, len(ids)
        while first < last:
            middle = (first + last + 1) // 2
            if decode(self.tokenizer, [*ids[middle:]]).endswith(spelled):
                first = middle
            else:
                last = middle - 1
        return first

    def _find_ending(self, ids: list[int], statement: int) -> _Stated | None:
        """Return where the tokens are that spell `ending`; None: it is not there so often."""
        text = decode(self.tokenizer, ids)
        match = next(islice(self.pattern.finditer(text), statement, None), None)
        if match is None:
            return None
        # Most samples end with the words, so the first steps are from the end, each twice as long.
        low, high, step = 1, len(ids), 1
        while high - step >= low and self._spells(ids[: high - step], text[: match.end()]):
            high, step = high - step, 2 * step
        low = max(low, high - step + 1)
        # Bisection works: a longer prefix keeps what a shorter one spells.
        while low < high:
            middle = (low + high) // 2
            if self._spells(ids[:middle], text[: match.end()]):
                high = middle
            else:
                low = middle + 1
        start = high - 1
        while start > 0 and match[0] not in decode(self.tokenizer, ids[start:high]):
            start -= 1
        whole = text if high == len(ids) else decode(self.tokenizer, ids[:high])
        if len(whole) == match.end():
            return _Stated(start, high, high, "")
        spelled = len(decode(self.tokenizer, ids[: high - 1]))
        return _Stated(start, high - 1, high, text[spelled : match.end()])

    def _spells(self, ids: list[int], beginning: str) -> bool:
        return decode(self.tokenizer, ids).startswith(beginning)

    def _encode_answer(self, before: str, template: str, answer: str) -> tuple[int, ...]:
        """Return the tokens of a template, or its rest, and the answer as after `before`."""
        if self.encoder.is_token(answer, but=self.eos_token_ids):
            return tuple(self.encoder.after(before, f"{template} {answer}", special=True))
        if template and self._opening_is_special:
            opened = self.encoder.after(before, template, special=True)
            return (*opened, *self._ids_after(template, f" {answer}"))
        return tuple(self._ids_after(before, f"{template} {answer}"))

    def _ids_after(self, before: str, text: str) -> list[int]:
        return self.encoder.after(before, text)

    def _anchor(self, prompt_ids: list[int], read: list[int], text: str) -> tuple[str, str]:
        """Return a stand-in for a prompt and what is read after it, and `text` as it reads then.

        Behind words that is a space, and behind thoughts what stands before their end. Right behind
        a prompt in the chat template's frame it is what the template puts there. A special token
        that ends the frame stands for the prompt, since it may change the white space behind it.
        """
        frame, thinking = self.frame, self.frame.thinking
        joint = " " if thinking is None else thinking.before
        if not read and frame.joint is not None and self._is_framed(prompt_ids):
            joint = frame.joint
            if token := self.encoder.special_end(frame.ending):
                return token, f"{joint}{text}"
            if not joint:
                return "\n", text
        if decode(self.tokenizer, [*prompt_ids, *read][-4:])[-1:].isspace():
            return "\n", text
        return ".", f"{joint}{text}"

    def _is_framed(self, prompt_ids: list[int]) -> bool:
        """Return whether a prompt ends as in the chat template, which callers may leave out."""
        ending = self.frame.ending
        token = self.encoder.special_end(ending)
        if token:
            ids = self.encoder.after("", token, special=True)
            return prompt_ids[-len(ids) :] == ids
        return bool(ending) and decode(self.tokenizer, prompt_ids[-len(ending) :]).endswith(ending)


class _Stated(NamedTuple):
    """The place in sampled tokens where they spell the words that end a rationale."""

    start: int
    """Index of the words' first token."""
    whole: int
    """Index behind the last token that belongs to the words as a whole."""
    end: int
    """Index behind the words' last token, which may spell more, as ": 5" in "Answer: 5"."""
    rest: str
    """The words' text from `whole` on."""
