"""Encode text as token ids; a special token that is spelled in the text stays text.

A question may ask what <eos> means. Its five characters are encoded as characters, and never as the
token that ends a text, in prompts, rationales and answers alike. Special tokens come only from the
frame of a chat template, from the tokenizer itself, and from callers that ask for them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial

from transformers import AddedToken, PreTrainedTokenizerBase

# Unicode reserves these characters for use inside a program, so no text has them.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_MOST_STAND_INS = 64


class TextEncoder:
    """Encodes text without special tokens, whatever the text spells.

    Args:
        tokenizer: any tokenizer, to which all its special tokens have been added.

    Raises:
        ValueError: it cannot tell text from special tokens, as mistral-common's cannot.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        # mistral-common's has a method of this name, which is not implemented.
        if not isinstance(tokenizer.added_tokens_decoder, Mapping):
            raise ValueError(
                "tokenizer: expected one of transformers' own, which reads a chat template and can "
                f"encode a special token as text, got {type(tokenizer).__name__}; load it by "
                "AutoTokenizer.from_pretrained(..., mistral_format=False)"
            )
        self.tokenizer = tokenizer
        # The unknown token is left out: it also stands for characters that the vocabulary lacks.
        self._special_ids = frozenset(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        self._special_names = frozenset(tokenizer.convert_ids_to_tokens([*self._special_ids]))
        tokens = {token: AddedToken(token) for token in tokenizer.all_special_tokens}
        added = tokenizer.added_tokens_decoder.values()
        tokens |= {token.content: token for token in added if token.special}
        # Longer names first, as the tokenizer matches them. White space and single characters
        # count as text even where they are special tokens.
        names = sorted((t for t in tokens if len(t.strip()) > 1), key=len, reverse=True)
        self._tokens = {name: tokens[name] for name in names}
        self._spelling = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._stand_ins: dict[tuple[str, bool], list[int]] = {}

    def __call__(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Return the ids of `text`.

        Equals `tokenizer.encode(text)` where nothing in the text spells a special token.

        Args:
            text: what is encoded.
            add_special_tokens: whether to add the tokens that the tokenizer puts around every text.
        """
        if not self.spells_special(text):
            return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))
        ids = self._encode(text, special=False)
        spelled = self.tokenizer.convert_ids_to_tokens(sorted(self._special_ids & set(ids)))
        spelled = [token for token in spelled if token in self._tokens]
        if spelled:
            # The vocabulary has these special tokens as ordinary pieces of words too.
            return self._cut(text, spelled, add_special_tokens=add_special_tokens)
        if add_special_tokens:
            return list(self.tokenizer.encode(text, split_special_tokens=True))
        return ids

    def each(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Return `tokenizer.encode` of each text, by one call of the tokenizer, which takes less.

        A special token that a text spells is read as that token.
        """
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        return [list(ids) for ids in encoded["input_ids"]]

    def after(self, before: str, text: str, *, special: bool = False) -> list[int]:
        """Return the ids that `text` has behind `before`, without the ids of `before`.

        With `special`, a special token that `text` spells is read as that token. One in `before`,
        which may change the white space behind it, is read so too where `text` spells none.
        """
        special = special or (self.spells_special(before) and not self.spells_special(text))
        encode = partial(self._encode, special=True) if special else self
        # Callers have a few stand-ins for what went before, and thousands of texts.
        prefix = self._stand_ins.get((before, special))
        if prefix is None:
            prefix = encode(before)
            if len(self._stand_ins) < _MOST_STAND_INS:
                self._stand_ins[before, special] = prefix
        whole = encode(before + text)
        if whole[: len(prefix)] == prefix and len(whole) > len(prefix):
            return whole[len(prefix) :]
        # Tokens merge across the border. Encoding the text alone is the nearest to its ids there.
        return encode(text)

    def is_token(self, text: str, *, but: Collection[int]) -> bool:
        """Return whether a text is exactly one special token without a role in the tokenizer.

        Tokens with a role (beginning, end, padding) do not count, nor do those in `but`.
        """
        # Most texts are the name of no special token, and need not be encoded to see that.
        if text not in self._special_names:
            return False
        ids = self._encode(text, special=True)
        return (
            len(ids) == 1
            and ids[0] in self._special_ids.difference(but)
            and text == self.tokenizer.convert_ids_to_tokens(ids[0])
            and text not in self.tokenizer.special_tokens_map.values()
        )

    def special_end(self, text: str) -> str:
        """Return the special token, and white space behind it, that end `text`; "": none does."""
        found = re.search(rf"(?:{self._spelling.pattern})\s*\Z", text)
        return "" if found is None else found[0]

    def spells_special(self, text: str) -> bool:
        """Return whether the tokenizer would read a special token in `text`."""
        return self._spelling.search(text) is not None

    def quoted(self, text: str) -> str:
        """Return the text with a stand-in for each special token that it spells.

        A frame may be put around quoted texts before `unquoted` encodes them.
        """
        numbers = {token: str(number) for number, token in enumerate(self._tokens)}
        text = text.replace(_OPEN, "").replace(_CLOSE, "")
        return self._spelling.sub(lambda match: _OPEN + numbers[match[0]] + _CLOSE, text)

    def unquoted(self, text: str) -> list[int]:
        """Return the ids of a frame with quoted texts in it; only the frame has special tokens."""
        names = list(self._tokens)
        ids: list[int] = []
        frame = ""
        # Text and special tokens alternate in the result.
        parts = re.split(f"({self._spelling.pattern})", text)
        for index, part in enumerate(parts):
            if index % 2 or _OPEN not in part:
                frame += part
                continue
            ids += self._encode(frame, special=True)
            frame = ""
            content = re.sub(f"{_OPEN}([0-9]+){_CLOSE}", lambda match: names[int(match[1])], part)
            # A template that truncates texts may have left half of a stand-in.
            content = content.replace(_OPEN, "").replace(_CLOSE, "")
            # Some special tokens absorb the white space beside them.
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
        """Return the ids of a text that is cut after the first character of each of `spelled`."""
        first, *rest = re.split(
            "|".join(f"(?<={re.escape(t[0])})(?={re.escape(t[1:])})" for t in spelled), text
        )
        opening = self.tokenizer.encode("")[:1] if add_special_tokens else []
        ids = opening if opening == [self.tokenizer.bos_token_id] else []
        ids = ids + self._encode(first, special=False)
        for piece in rest:
            ids += self.after("\n", piece)
        return ids
