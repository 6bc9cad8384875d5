"""Tasks whose answer is a number: reading it from text, exactly.

The rule. Of the sentence that the answer template begins, what follows the last "=" counts, or
all of it where there is none. It must name one number, however often; "12 or 13" names two and is
no answer. Thousands are grouped by commas in threes or not at all. Currency, percent and units are
dropped ("$18", "5%" and "18 dollars" are 18, 5 and 18), "3/4" is a fraction, "2.5e3" is 2500, and a
Unicode minus is a minus, as is an en dash that comes first, or right before a number and not
behind one. Values are compared as fractions, so 1200 is 1,200.00 and 0.1 is exactly 1/10.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from .base import Task, first_sentence

_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_NUMBER = re.compile(
    r"(?<![\w.,/])"  # whole: "A2", "1x3", "1,2" and "1.2.3" hold no number
    r"(?P<sign>-?)\s?[$€£¥]?\s?(?P<inner_sign>-?)"
    rf"(?P<magnitude>(?:{_INTEGER}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]{{1,3}})?)"
    r"(?:/(?P<denominator>[0-9]+))?(?!\w*[0-9]|[.,/][0-9])"
)
_EN_DASH_AS_MINUS = re.compile(r"^\s*\u2013|(?<!\d)(?<!\d\s)\u2013(?=[$€£¥]?[.0-9])")
_MINUS_SIGNS = str.maketrans({"\u2212": "-", "\uff0d": "-", "\ufe63": "-"})
# Past this a string of digits is degenerate sampling, and int() refuses a few thousand of them.
_MAX_DIGITS = 100


class NumericTask(Task):
    """A task whose canonical answer is `str(Fraction)`: "1200", "-3", "3/4"."""

    def same(self, predicted: str, answer: str) -> bool:
        value = parse_number(answer)
        if value is None:
            raise ValueError(f"answer must be one number; got {answer!r}")
        return parse_number(predicted) == value

    def _canonical(self, statement: str, example: Mapping[str, Any]) -> str | None:
        value = parse_number(first_sentence(statement))
        return None if value is None else str(value)


def parse_number(text: str) -> Fraction | None:
    """The one number that `text` names by the rule above, or None."""
    stated = text.rpartition("=")[2].translate(_MINUS_SIGNS)
    stated = _EN_DASH_AS_MINUS.sub("-", stated)
    values = {_value(match) for match in _NUMBER.finditer(stated)}
    return values.pop() if len(values) == 1 else None


def _value(match: re.Match[str]) -> Fraction | None:
    if match.end() - match.start() > _MAX_DIGITS:
        return None
    magnitude = Fraction(match["magnitude"].replace(",", ""))
    if match["denominator"] is not None:
        denominator = int(match["denominator"])
        if denominator == 0:
            return None
        magnitude /= denominator
    value = -magnitude if match["sign"] or match["inner_sign"] else magnitude
    # "1e999" is short, but its canonical form is not, and has to be read again.
    return value if len(str(value)) <= _MAX_DIGITS else None
