"""Where a completion that is being sampled ends, token by token."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from latro.rollout.answer_template import ending_pattern
from latro.rollout.sequences import decode_batch


class EndRule:
    """Ends a row at an end token, or where its decoded text contains the whole `template`.

    Where the template ends in a word, this takes one more token, which shows that the word has
    ended (`latro.rollout.answer_template.ending_pattern`).

    Decoded text is matched instead of token ids, because the same words can be tokenized in many
    ways.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: Sequence[int],
        template: str | None,
    ) -> None:
        self.tokenizer = tokenizer
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
        texts = decode_batch(self.tokenizer, [row[-self.window :] for row in rows])
        for index, (row, text) in enumerate(zip(rows, texts, strict=True)):
            # A match at the window's first character is skipped: what stands before it is not
            # visible, and an earlier step has judged it.
            cut = int(len(row) > self.window)
            if not ended[index]:
                ended[index] = self.pattern.search(text, cut) is not None
        return ended
