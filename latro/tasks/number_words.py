"""Numbers in English words: "minus twenty-five", "two and a half", "one hundred and five".

Only what has one reading becomes a figure. "Nineteen eighty-four" is two numbers, "twenty-first"
and "second" are none, and "one" is a pronoun in "the last one" and "one of them".
"""

from __future__ import annotations

import re
from fractions import Fraction

# fmt: off
_SMALL = {word: value for value, word in enumerate((
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
))}
_TENS = {
    "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80,
    "ninety": 90,
}
_SCALES = {"trillion": 10**12, "billion": 10**9, "million": 10**6, "thousand": 10**3}
_PARTS = {
    "half": 2, "halve": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6,
    "seventh": 7, "eighth": 8, "ninth": 9, "tenth": 10,
}
_ARTICLES = ("a", "an")
_PRONOUN_BEFORE = {
    "the", "this", "that", "last", "each", "every", "any", "no", "another", "other", "right",
    "correct",
}
_PRONOUN_BEHIND = {"of", "is", "was", "who", "that", "which", "more", "another", "thing"}
# fmt: on

_RUN = re.compile(r"(?<![\w-])[A-Za-z]+(?:[ \t-][A-Za-z]+)*(?!\w)")
_WORD = re.compile(r"[A-Za-z]+")
_NEAR = 40
# Figures and a joint that make number words after them a second number: "18 or twenty".
_JOINED = re.compile(r"\d[\d.,]*\s*(?:or|to|and|through|plus|minus|times|,|-|–|/)\s*$")


def with_figures(text: str) -> str:
    """Return the text with its numbers in figures.

    After a number in figures, words count only where they are joined to it: "18 or twenty" has two
    numbers, "18 pens for the two of them" has one.
    """
    pieces, done = [], 0
    figure_before = re.search(r"\d", text)
    first_figure = figure_before.start() if figure_before else len(text)
    for run in _RUN.finditer(text):
        words = list(_WORD.finditer(text, run.start(), run.end()))
        spelled = [word[0].lower() for word in words]
        # A hyphen joins a number to a word that makes it none: "twenty-first", "five-year".
        hyphens = [text[word.end() : word.end() + 1] == "-" for word in words]
        i = 0
        while i < len(words):
            parsed = _number(spelled, i)
            if parsed is None:
                i += 1
                continue
            value, end = parsed
            alone = not (hyphens[i - 1] if i else False) and not hyphens[end - 1]
            start = words[i].start()
            counts = start < first_figure or _JOINED.search(text[max(0, start - _NEAR) : start])
            if alone and counts and not _is_pronoun(spelled, i, end):
                # "One hundred and two hundred" is no number; it is replaced by an unknown command.
                whole = spelled[end : end + 1] not in [["hundred"], *([name] for name in _SCALES)]
                figure = _figure(value) if whole else "\\number"
                pieces += [text[done:start], figure]
                done = words[end - 1].end()
            i = end
    return "".join([*pieces, text[done:]])


def _number(words: list[str], i: int) -> tuple[Fraction, int] | None:
    """Return the number that begins at word `i`, and the index of the word after it."""
    following = words[i + 1 : i + 3]
    if words[i] == "half":
        return (Fraction(6), i + 3) if following == ["a", "dozen"] else (Fraction(1, 2), i + 1)
    if words[i] in _ARTICLES:
        if following[:1] == ["dozen"]:
            return Fraction(12), i + 2
        if following[:1] in (["half"], ["quarter"]):
            return Fraction(1, _PARTS[following[0]]), i + 2
    whole = _whole(words, i)
    if whole is None:
        return None
    value, end = whole
    rest = words[end:]
    if rest and rest[0].removesuffix("s") in _PARTS and value > 0:
        if rest[0].endswith("s") == (value > 1):
            return Fraction(value, _PARTS[rest[0].removesuffix("s")]), end + 1
        if value > 1:  # "two sixth graders"
            return None
    part = _number(words, end + 1) if rest[:1] == ["and"] and len(rest) > 1 else None
    if part and 0 < part[0] < 1:  # "and a half"
        return value + part[0], part[1]
    if len(rest) >= 2 and rest[0] == "point" and _SMALL.get(rest[1], 10) < 10:
        digits = ""
        end += 1
        while end < len(words) and _SMALL.get(words[end], 10) < 10:
            digits += str(_SMALL[words[end]])
            end += 1
        return value + Fraction(int(digits), 10 ** len(digits)), end
    return Fraction(value), end


def _whole(words: list[str], i: int) -> tuple[int, int] | None:
    if words[i] == "zero":
        return 0, i + 1
    total, end = 0, i
    for name, scale in _SCALES.items():
        part = _below_1000(words, _past_and(words, end, total))
        if part is not None and words[part[1] : part[1] + 1] == [name]:
            total, end = total + part[0] * scale, part[1] + 1
    last = _below_1000(words, _past_and(words, end, total))
    # "A" is a number only before a scale: "a thousand", not "a pen".
    if last is not None and words[last[1] - 1] not in _ARTICLES:
        total, end = total + last[0], last[1]
    return (total, end) if end > i else None


def _below_1000(words: list[str], i: int) -> tuple[int, int] | None:
    head = (1, i + 1) if i < len(words) and words[i] in _ARTICLES else _below_100(words, i)
    if head is None or words[head[1] : head[1] + 1] != ["hundred"]:
        return head
    total, end = head[0] * 100, head[1] + 1
    rest = _below_100(words, _past_and(words, end, total))
    return (total, end) if rest is None else (total + rest[0], rest[1])


def _below_100(words: list[str], i: int) -> tuple[int, int] | None:
    word = words[i] if i < len(words) else ""
    if word in _TENS:
        unit = _SMALL.get(words[i + 1], 0) if i + 1 < len(words) else 0
        return (_TENS[word] + unit, i + 2) if 0 < unit < 10 else (_TENS[word], i + 1)
    return (_SMALL[word], i + 1) if _SMALL.get(word) else None


def _past_and(words: list[str], i: int, total: int) -> int:
    return i + 1 if total and words[i : i + 1] == ["and"] else i


def _is_pronoun(words: list[str], i: int, end: int) -> bool:
    if words[i:end] != ["one"]:
        return False
    before, behind = words[max(i - 1, 0) : i], words[end : end + 1]
    return bool(_PRONOUN_BEFORE.intersection(before) or _PRONOUN_BEHIND.intersection(behind))


def _figure(value: Fraction) -> str:
    whole, rest = divmod(value.numerator, value.denominator)
    part = f"{rest}/{value.denominator}" if rest else ""
    return f"{whole} {part}".strip() if whole or not part else part
