"""Text as token ids, where what spells a special token is text.

A question may ask what <eos> means. Its five characters are read as such, and never as the token
that ends a text, in prompts, rationales and answers alike. Special tokens come from the frame of a
chat template, from the tokenizer itself, and from what says that it wants them.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import partial

from transformers import AddedToken, PreTrainedTokenizerBase

# Unicode keeps these for use inside of a program, so that no text has them.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


class TextEncoder:
    """Encodes text that no special token is in, whatever it spells.

    Args:
        tokenizer: any tokenizer, with all the special tokens that it is to have.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        # A character that the vocabulary lacks is unknown in text, too.
        self._special_ids = frozenset(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        tokens = {token: AddedToken(token) for token in tokenizer.all_special_tokens}
        added = tokenizer.added_tokens_decoder.values()
        tokens |= {token.content: token for token in added if token.special}
        # Longer ones first, as they are read. White space is text by any name, and one character is
        # nothing else.
        names = sorted((t for t in tokens if len(t.strip()) > 1), key=len, reverse=True)
        self._tokens = {name: tokens[name] for name in names}
        self._spelling = re.compile("|".join(map(re.escape, names)) or "(?!)")

    def __call__(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Return the ids of `text`, with the special tokens that are always put around it or not.

        Equals `tokenizer.encode(text)` where nothing in the text spells a special token.
        """
        if not self.spells_special(text):
            return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))
        ids = self._encode(text, special=False)
        spelled = self.tokenizer.convert_ids_to_tokens(sorted(self._special_ids & set(ids)))
        spelled = [token for token in spelled if token in self._tokens]
        if spelled:
            # The vocabulary has them among the pieces of words.
            return self._cut(text, spelled, add_special_tokens=add_special_tokens)
        if add_special_tokens:
            return list(self.tokenizer.encode(text, split_special_tokens=True))
        return ids

    def after(self, before: str, text: str, *, special: bool = False) -> list[int]:
        """Return the ids of `text` where `before` stands in front of it, without those of `before`.

        `special`: what spells a special token in `text` is that token.
        """
        encode = partial(self._encode, special=True) if special else self
        prefix, whole = encode(before), encode(before + text)
        if whole[: len(prefix)] == prefix and len(whole) > len(prefix):
            return whole[len(prefix) :]
        # The two merge across the border; the text on its own is the nearest that keeps the ids.
        return encode(text)

    def is_token(self, text: str, *, but: Collection[int]) -> bool:
        """Return whether a text is one special token and nothing else, for a use of its own.

        Those that the tokenizer has a role for (beginning, end, padding) are none, nor are `but`.
        """
        ids = self._encode(text, special=True)
        return (
            len(ids) == 1
            and ids[0] in self._special_ids.difference(but)
            and text == self.tokenizer.convert_ids_to_tokens(ids[0])
            and text not in self.tokenizer.special_tokens_map.values()
        )

    def spells_special(self, text: str) -> bool:
        """Return whether a special token would be read into `text`."""
        return self._spelling.search(text) is not None

    def quoted(self, text: str) -> str:
        """Return the text with a stand-in for each special token that it spells.

        A frame may be put around quoted texts before `unquoted` encodes them.
        """
        numbers = {token: str(number) for number, token in enumerate(self._tokens)}
        text = text.replace(_OPEN, "").replace(_CLOSE, "")
        return self._spelling.sub(lambda match: _OPEN + numbers[match[0]] + _CLOSE, text)

    def unquoted(self, text: str) -> list[int]:
        """Return the ids of quoted texts in their frame, whose special tokens are tokens."""
        names = list(self._tokens)
        ids: list[int] = []
        frame = ""
        # Text and special tokens by turns.
        parts = re.split(f"({self._spelling.pattern})", text)
        for index, part in enumerate(parts):
            if index % 2 or _OPEN not in part:
                frame += part
                continue
            ids += self._encode(frame, special=True)
            frame = ""
            content = re.sub(f"{_OPEN}([0-9]+){_CLOSE}", lambda match: names[int(match[1])], part)
            # A template that cuts texts may have left half of a stand-in.
            content = content.replace(_OPEN, "").replace(_CLOSE, "")
            # Some tokens take the white space beside them.
            if index and self._tokens[parts[index - 1]].rstrip:
                content = content.lstrip()
            if index + 1 < len(parts) and self._tokens[parts[index + 1]].lstrip:
                content = content.rstrip()
            ids += self.after("\n", content) if ids else self(content)
        return ids + self._encode(frame, special=True)

    def _encode(self, text: str, *, special: bool) -> list[int]:
        ids = self.tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=not special
        )
        return list(ids)

    def _cut(self, text: str, spelled: list[str], *, add_special_tokens: bool) -> list[int]:
        """The ids of a text that is cut behind the first character of what is spelled in it."""
        first, *rest = re.split(
            "|".join(f"(?<={re.escape(t[0])})(?={re.escape(t[1:])})" for t in spelled), text
        )
        opening = self.tokenizer.encode("")[:1] if add_special_tokens else []
        ids = opening if opening == [self.tokenizer.bos_token_id] else []
        ids = ids + self._encode(first, special=False)
        for piece in rest:
            ids += self.after("\n", piece)
        return ids
