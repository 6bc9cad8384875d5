r"""Tasks whose answer is one of a few options: find in a text which option it names.

A row has a column `choices` with the lists "label" and "text". The label of the right option is
what completions are graded against: `ground_truth`, or else `answer`.

The rule: the statement after the answer template names an option by its label ("B", "(b)", "<B>",
"the letter B", "\boxed{B}", "B) the whole text", "B is right"), by its whole text (never by a part
of it), by both ("light energy (B)"), or by its place ("the second option", "the last one"). A
statement that names no option, or more than one, is no answer. Options in a reason or a contrast do
not count: "B because A is wrong" and "B, not A" are B, and "not B" is no answer. A label followed
by "." or "!" is the answer, whatever sentence follows, unless that sentence is another option. Case
and closing punctuation count only where options differ in nothing else, as in "Ww" and "WW". A
statement that is one option's label and another option's text counts as the label, since the prompt
asks for that.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .base import SEVERAL, Task
from .markup import CROSSES, TAG, first_line, first_sentence, folded, unmarked, without_marks

_MARKS = " .!?*_$\"'`“”‘’"
_CLOSING = _MARKS + ")]}>」】»"
_MARKUP = r"[\s*_$\"'`“”‘’]*"
_NOUN = r"(?:option|choice|letter|label|alternative|answer|item|statement|possibility)"

# Words that may stand before the option without changing which it is.
_LEAD = re.compile(
    rf"(?:[\s(\[*_\"“‘:=]*\b(?:{_NOUN}s?|number|correct|right|best|final|likely|probably|most"
    r"|definitely|certainly|clearly|obviously|surely|simply|just|only|therefore|thus|hence|so|then"
    r"|indeed|actually|the|one|my|that|it|it['’]s|is|would|must|should|has|be|to|labell?ed|marked"
    r"|given|by|named|called|following|as\s+follows|I\s+think|I\s+believe|I\s+guess|(?:I|I['’]d|I['’]ll|we)\s+(?:choose|pick|select|go\s+with)|choose|pick|select|I['’]d\s+say|not\s+\(?\w\)?,?\s+but)"
    r"(?![\w'’])[\s:,.*_=]*)+",
    re.IGNORECASE,
)
_AFTER_NOUN = re.compile(rf"\b(?:{_NOUN}|number|labell?ed|marked)[\s:*_(\[\"“‘]*$", re.IGNORECASE)
_IS_RIGHT = (
    r"(?:is|was|would\s+be|must\s+be|seems)\s+(?:to\s+be\s+)?(?:(?:the|most|only|clearly)\s+)*"
    r"(?:right|correct|best|true|answer)\b"
)
_REASON = (
    r"(?:because|since|due\s+to|while|whereas|(?:al|even\s+)?though"
    r"|(?<!well )as(?!\s+(?:well|is|are|much|many)\b))\b"
)
_CONTRAST = r"(?:not|rather\s+than|instead\s+of|as\s+opposed\s+to|unlike)\b"
_REMARK = re.compile(rf"\b(?:{_REASON}|{_CONTRAST})", re.IGNORECASE)
# A bare label needs punctuation after it: "A stone" begins with an article, "3 metres" with a
# number.
_BEHIND_LABEL = (
    r"(?:[)\]>}」】»][*_]*\s*[.!?:,;]?|[.!?](?!\w)|[.!?](?=[A-Z][a-z])|[:,;]|$"
    r"|(?<=\s)(?:only|alone)\s*[.!]?$|(?<=\s)[-–](?=\s)|—|(?<=\s)(?=\()"
    rf"|(?=\b(?:{_REASON}|{_IS_RIGHT}|rather\s+than\b|instead\s+of\b|(?:(?:and|but)\s+)?not\s+[(\[]?\w[)\]]?(?!\w))))"
)
_LABELLED = re.compile(
    rf"[-–—=>#→.…\s]*{_MARKUP}[(\[<{{「【«]{{0,2}}\s*(?P<label>\w){_MARKUP}{_BEHIND_LABEL}",
    re.IGNORECASE,
)
# After "option" a label needs no punctuation, but a remark may follow: "option B is wrong".
_NOUN_LABELLED = re.compile(
    rf"[(\[<{{]?(?P<label>\w)(?!\w|['’]\w)[)\]>}}]?{_MARKUP}"
    rf"(?=$|[^\w\s]|(?:{_IS_RIGHT}|{_REASON}|{_CONTRAST}|which\b|that\b|with\b|for\b))",
    re.IGNORECASE,
)
_LABEL_AND_TEXT = re.compile(r"(?P<label>\w)\s+(?:(?:is|=|->|→)\s+)?(?P<text>.+)")
# "A wind" begins with an article, "I know" with a pronoun; "A is" and "A or" begin with a label.
_NO_LABEL = re.compile(
    r"\b(?:[Ii](?=['’])|[AaIi](?=\s+(?!(?:and|or|nor|is|are|too|because)\b)[a-z]))"
)
# What stands behind an option's text: "0.5", "3-5" and "x**2" are not the options 0, 3 and x.
_NOT_MORE = r"(?!\w|[.,:/–-]+\d|[*^_]+\w)"
_ARTICLE = re.compile(r"^(?:a|an|[Tt]he)\s+")

# fmt: off
_ANOTHER = "\0"
_GOES_ON = re.compile(r"[\s.!?]*(?:(?:or|and|nor)\b|[(\[])", re.IGNORECASE)
_ORDINALS = [
    "first|1st", "second|2nd", "third|3rd", "fourth|4th", "fifth|5th", "sixth|6th", "seventh|7th",
    "eighth|8th", "ninth|9th", "tenth|10th",
]
_CARDINALS = [
    "one|1", "two|2", "three|3", "four|4", "five|5", "six|6", "seven|7", "eight|8",
    "nine|9", "ten|10",
]
# fmt: on
_LAST = "last|final"
_ORDINAL = "|".join([*_ORDINALS, _LAST])
_PLACE = re.compile(
    rf"(?:the\s+)?(?:very\s+)?(?:(?P<ordinal>{_ORDINAL})(?:\s+(?:listed\s+)?(?:{_NOUN}|one)(?:\s+{_NOUN})*\b"
    rf"(?:\s+(?:above|listed|given|in\s+the\s+list))?|(?=\s*[.!]?\s*$))"
    rf"|(?:{_NOUN}\s+(?:number\s+|no\.?\s*|\#\s?)?|number\s+|no\.\s*|\#\s?)(?P<cardinal>{'|'.join(_CARDINALS)})\b)"
    rf"(?=\s*(?:[.,;:!(–—-]|$|\b(?:{_REASON}|{_CONTRAST}|{_IS_RIGHT})))",
    re.IGNORECASE,
)
_DENIAL = re.compile(r"\b(?:not|never|neither|nor|wrong|incorrect|false)\b|n['’]t\b", re.IGNORECASE)


class ChoiceTask(Task):
    """A task whose canonical answer is the label of an option."""

    def same(self, predicted: str, answer: str) -> bool:
        return predicted == answer

    def _canonical(self, statement: str, example: Mapping[str, Any]) -> str | None:
        options = _Options(example["choices"]["label"], example["choices"]["text"])
        whole = unicodedata.normalize("NFC", statement).strip(" \t\r\n:")
        return options.named_by(whole, _plain(statement).strip(" \t\r\n:"))


@dataclass(frozen=True)
class _Stated:
    """The option that a line begins with, by its label or its text."""

    label: str
    spelled: str
    """The label in the case of the line."""
    rest: str
    """The text after the option and the punctuation that closes it."""
    ends: bool = False
    """Whether that punctuation ends a statement."""
    led: bool = False
    """Whether words stand before the option."""


@dataclass(frozen=True)
class _Options:
    """The options of a problem."""

    labels: list[str]
    texts: list[str]

    def named_by(self, whole: str, plain: str) -> str | None:
        """Return the label of the option that a statement names.

        Return None where it names no option, and `SEVERAL` where it names more than one.

        Args:
            whole: the statement as it was written.
            plain: the statement without LaTeX and other markup.
        """
        line = first_line(plain)
        stated = self._leading_label(line)
        if stated and not stated.led and self._is_alone(stated):
            return stated.label
        # An option's text may itself hold line breaks and sentences, so the longest comes first.
        candidates = [whole, whole.partition("\n")[0].strip(), plain, line]
        sentence = first_sentence(line)
        if stated is None or len(sentence) > len(line) - len(stated.rest):  # more than the label
            candidates.append(sentence)
        for candidate in candidates:
            named = self.with_text(candidate) or self.with_text(
                _ARTICLE.sub("", candidate, count=1)
            )
            if len(named) > 1:
                return SEVERAL
            if named:
                rest = line[len(sentence) :] if candidate == sentence else ""
                # "It falls. (C)" and "It falls. or It rises." go on; another sentence does not.
                ends = _GOES_ON.match(rest) is None
                stated = _Stated(named[0], named[0], rest.lstrip(_MARKS), ends=ends)
                return SEVERAL if self._names_another(stated) else stated.label
        if stated is None:
            by_text, by_place = self._leading_text(line), self._leading_place(line)
            stated = by_text or by_place
            if by_text and by_place and by_text.label != by_place.label:
                return SEVERAL  # "option 3" of 3, 2 and 1
        if stated is None:
            return self._none_named(sentence)
        return SEVERAL if self._names_another(stated) else stated.label

    def with_text(self, statement: str) -> list[str]:
        """Return the labels of options with this text, by the strictest comparison that has any."""
        for reading in (_collapsed, _bare, _caseless, _letters):
            stated = reading(statement)
            texts = map(reading, self.texts)
            pairs = zip(self.labels, texts, strict=True)
            named = [label for label, text in pairs if stated and text == stated]
            if named:
                return named
        return []

    def _label(self, spelled: str) -> str | None:
        same = (label for label in self.labels if label.upper() == spelled.upper())
        return next(same, None)

    def _is_alone(self, stated: _Stated) -> bool:
        inner = stated.rest.strip(_CLOSING)
        rests = (inner, stated.rest.strip())
        return not inner or any(stated.label in self.with_text(rest) for rest in rests)

    def _leading_label(self, line: str) -> _Stated | None:
        """Return the label that a line begins with, after words that do not matter."""
        lead = _LEAD.match(line)
        for start in [0, lead.end()] if lead else [0]:
            match = _LABELLED.match(line, start)
            if match is None and start and _AFTER_NOUN.search(line[:start]):
                match = _NOUN_LABELLED.match(line, start)
            label = self._label(match["label"]) if match else None
            if match and label:
                ends = match[0][-1:] in (".", "!")
                rest = line[match.end() :]
                return _Stated(label, match["label"], rest, ends=ends, led=start > 0)
            # In "B light energy" or "B is light energy", label and text must be of one option.
            match = _LABEL_AND_TEXT.match(line, start)
            label = self._label(match["label"]) if match else None
            by_text = self._leading_text(match["text"]) if match and label else None
            if by_text and by_text.label == label:
                return by_text
        return None

    def _leading_text(self, line: str) -> _Stated | None:
        """Return the option whose text a line begins with, if a label or a remark follows."""
        lead = _LEAD.match(line)
        for start in [0, lead.end()] if lead else [0]:
            rest_of_line = _ARTICLE.sub("", line[start:], count=1)
            for begun in (line[start:], rest_of_line):
                for _, text in self._longest_first():
                    pattern = rf"{_MARKUP}({re.escape(text)}){_NOT_MORE}{_MARKUP}"
                    match = re.match(pattern, begun, re.IGNORECASE)
                    if match is None:
                        continue
                    named, rest = self.with_text(match[1]), begun[match.end() :]
                    if len(named) != 1 or not self._is_remark(rest):
                        return None
                    return _Stated(named[0], named[0], rest)
        return None

    def _is_remark(self, rest: str) -> bool:
        labelled = re.match(
            rf"[\s.?!,;:–—-]*[(\[]?\s*(?:(?:=|->|→|so|is|(?:which|that)\s+is)\s+)?(?:the\s+)?(?:{_NOUN}\s+)*"
            rf"[(\[<{{]?(?P<label>\w)[)\]>}}]*{_MARKUP}(?:[.,;!:)\]]|$)",
            rest,
            re.IGNORECASE,
        )
        if labelled is not None and self._label(labelled["label"]) is not None:
            return True
        remark = (
            rf"[\s,;(–—-]*(?:\b(?:{_REASON}|{_CONTRAST}|(?:and|but)\s+not\b|which\b|{_IS_RIGHT})"
            r"|[.!](?:\s|$)|$)"
        )
        return re.match(remark, rest, re.IGNORECASE) is not None

    def _leading_place(self, line: str) -> _Stated | None:
        """Return the option that a line names by its place: "the second option"."""
        lead = _LEAD.match(line)
        matches = [_PLACE.match(line, start) for start in ([0, lead.end()] if lead else [0])]
        match = next((m for m in matches if m), None)
        if match is None:
            return None
        if match["ordinal"] and re.fullmatch(_LAST, match["ordinal"], re.IGNORECASE):
            place = len(self.labels)
        else:
            words = _ORDINALS if match["ordinal"] else _CARDINALS
            said = (match["ordinal"] or match["cardinal"]).lower()
            place = 1 + next(i for i, word in enumerate(words) if said in word.split("|"))
        rest = line[match.end() :]
        another = re.search(rf"\b(?:{_ORDINAL})\b", _REMARK.split(rest)[0], re.IGNORECASE)
        if place > len(self.labels) or another:
            return None
        label = self.labels[place - 1]
        if match["cardinal"] and str(place) in self.labels:
            label = str(place)
        return _Stated(label, label, rest)

    def _names_another(self, stated: _Stated) -> bool:
        """Return whether the text after an option names another, by label or whole text."""
        others = {label for label in self.labels if label != stated.label}
        if stated.ends:
            sentence = first_sentence(stated.rest)
            return sentence in others or bool(self.with_text(sentence))

        def hidden(found: re.Match[str]) -> str:
            return "_" if stated.label in self.with_text(found[0]) else _ANOTHER

        # The longest first, so that none is found inside another's text.
        texts = "|".join(re.escape(text) for _, text in self._longest_first())
        text = re.compile(rf"(?<!\w)(?:{texts})(?!\w)", re.IGNORECASE)
        # A text may itself have the words that open a remark.
        rest = text.sub(hidden, _collapsed(stated.rest))
        sentence = first_sentence(_REMARK.split(rest, maxsplit=1)[0])
        words = set(re.findall(r"\w+", _NO_LABEL.sub("", sentence)))
        if stated.spelled != stated.label:  # "b or c"
            others |= {label.swapcase() for label in others}
        return bool(_ANOTHER in sentence or others & words)

    def _none_named(self, sentence: str) -> str | None:
        """Return `SEVERAL` if a statement that begins with no option mentions some, else None."""
        if _DENIAL.search(sentence):
            return None
        words = set(re.findall(r"\w+", _NO_LABEL.sub("", sentence)))
        texts = "|".join(re.escape(text) for _, text in self._longest_first())
        named = re.search(rf"(?<!\w)(?:{texts})(?!\w)", sentence, re.IGNORECASE)
        return SEVERAL if named or words & set(self.labels) else None

    def _longest_first(self) -> list[tuple[str, str]]:
        return sorted(self._spellings(), key=lambda pair: len(pair[1]), reverse=True)

    def _spellings(self) -> Iterator[tuple[str, str]]:
        for label, text in zip(self.labels, self.texts, strict=True):
            yield from (
                (label, spelled) for spelled in {_bare(text), _bare(_plain(text))} if spelled
            )


@lru_cache(maxsize=4096)
def _plain(text: str) -> str:
    """Return the text without markup, tags and symbols such as check marks."""
    letters = re.sub(CROSSES, " wrong ", TAG.sub("\n", folded(unmarked(text))))
    plain = "".join(" " if unicodedata.category(c) == "So" else c for c in letters)
    # Options are compared with single spaces, and "78° F" has two now.
    return re.sub(" {2,}", " ", plain)


def _collapsed(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _bare(text: str) -> str:
    collapsed = _collapsed(text)
    return without_marks(collapsed, _MARKS) or collapsed


def _caseless(text: str) -> str:
    return _bare(text).casefold()


@lru_cache(maxsize=4096)
def _letters(text: str) -> str:
    """Return a text without markup: "H₂O" becomes "H2O", "$x$" becomes "x"."""
    return re.sub(r"[\^_{}]", "", _caseless(_plain(text)))
