"""Where a completion that is being sampled ends, token by token."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from latro.rollout.answer_template import ending_pattern
from latro.rollout.sequences import decode, decode_batch

_PART = "\ufffd"  # what half of a character is decoded to


class TokenLetters(dict[int, str]):
    """The letters that each token spells by itself, as `letters_of` gives them.

    A token is decoded when it is first asked for.

    Args:
        tokenizer: decodes the tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def __missing__(self, token: int) -> str:
        self[token] = letters = letters_of(decode(self.tokenizer, [token]))
        return letters


def letters_of(text: str) -> str:
    """Return the letters and digits of a text in one case, and its halves of characters."""
    return "".join(c for c in text.casefold() if c.isalnum() or c == _PART)


class EndRule:
    """Ends a row at an end token, or where its decoded text contains the whole `template`.

    Where the template ends in a word, this takes one more token, which shows that the word has
    ended (`latro.rollout.answer_template.ending_pattern`).

    Decoded text is matched instead of token ids, because the same words can be tokenized in many
    ways. To decode every row at every step would take the host longer than a GPU takes for the
    step. So a row is decoded only where its tokens, one by one, spell the letters of the template,
    or where one of them is half of a character, which only its neighbours complete.

    Args:
        tokenizer: decodes the rows.
        eos_token_ids: the end tokens.
        template: the text that ends a row; None: only end tokens do.
        letters: what the tokens spell, known from earlier calls; None: nothing is known yet.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: Sequence[int],
        template: str | None,
        letters: TokenLetters | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.letters = TokenLetters(tokenizer) if letters is None else letters
        # Empty for a template without letters, as "####"; then all rows are decoded.
        self._needed = letters_of(template or "")
        self.eos_token_ids = frozenset(eos_token_ids)
        self.pattern = ending_pattern(template) if template else None
        # Tokens to look back over. A token spells at least one byte, or nothing visible at the
        # start of the window; the characters on both sides of the template, up to 4 bytes each,
        # decide whether it is whole.
        self.window = len(template.encode()) + 12 if template else 1

    def __call__(self, rows: Sequence[Sequence[int]]) -> list[bool]:
        """Return whether each row ends with its last token; none of them ended before it.

        Args:
            rows: the tokens that were sampled so far, at least one each.
        """
        ended = [row[-1] in self.eos_token_ids for row in rows]
        if self.pattern is None:
            return ended
        tails = [row[-self.window :] for row in rows]
        open_rows = [i for i, tail in enumerate(tails) if not ended[i] and self._may_state(tail)]
        if not open_rows:
            return ended
        texts = decode_batch(self.tokenizer, [tails[index] for index in open_rows])
        for index, text in zip(open_rows, texts, strict=True):
            # A match at the window's first character is skipped: what stands before it is not
            # visible, and an earlier step has judged it.
            cut = int(len(rows[index]) > self.window)
            ended[index] = self.pattern.search(text, cut) is not None
        return ended

    def _may_state(self, tail: Sequence[int]) -> bool:
        """Return False where the tokens of a window cannot spell the template."""
        if not self._needed:
            return True
        seen = "".join(map(self.letters.__getitem__, tail))
        return self._needed in seen or _PART in seen
