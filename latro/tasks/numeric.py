r"""Tasks whose answer is a number, which is read from text exactly.

The rule: the sentence that the answer template begins must name one number, however often: "12 or
13" names two and is no answer, "18, that is $18.00" names one. In "5 + 3 = 8" the last part counts,
since an arithmetic expression stands before it; any other "=" is a remark. Remarks after a number
are ignored: a reason ("18 because 3 are left"), a contrast ("18, not 20"), a condition ("5 (with
x = 2)"). A bound or a denial ("more than 18", "not 18") states nothing.

Thousands are grouped in threes or not at all, by commas, apostrophes or thin spaces. Currency,
percent and units are dropped: "$18", "5%" and "18 m²" are 18, 5 and 18. "3/4", "½" and
"\frac{3}{4}" are fractions, and "2 3/4" is a mixed one; "2.5e3", "2.5 × 10³", "2.5k" and "2.5
thousand" are 2500; "minus eighteen" is -18. A Unicode minus is a minus, and so is an en dash that
comes first, or stands right before a number and not after one. A value that is still to be
computed, such as "2π" or "9 + 9", is no answer, nor is a number with a letter that may be a unit or
a scale ("5 B"). Values are compared as fractions, so 1200 equals 1,200.00 and 0.1 is exactly 1/10.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from .base import SEVERAL, Task
from .figures import UNREADABLE, plain_figures
from .markup import CROSSES, first_sentence

_GROUPED = "|".join(rf"[0-9]{{1,3}}(?:{mark}[0-9]{{3}})+" for mark in (",", "['’]", "_"))
# "1,00,000" is how India groups.
_INTEGER = rf"(?:{_GROUPED}|[0-9]{{1,2}}(?:,[0-9]{{2}})+,[0-9]{{3}}|[0-9]+)"
_POWER = r"(?:\^|\*\*)\s?(?:\(\s?(?P<{0}_in>[-+]?[0-9]{{1,3}})\s?\)|(?P<{0}>[-+]?[0-9]{{1,3}}))"
_NUMBER = re.compile(
    r"(?<![\w.,/:^])(?<![\w^][(\[])"  # whole: "A2", "1x3", "1,2", "1:2" and "f(3)" hold no number
    r"(?P<sign>[-+]?)\s?\$?\s?(?P<inner_sign>-?)"
    r"(?:(?P<whole>[0-9]+)\s(?=[0-9]+\s?/))?"
    rf"(?P<magnitude>(?:{_INTEGER}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]{{1,3}})?)"
    rf"(?:\s?{_POWER.format('power')})?"
    rf"(?:\s?[×*]\s?10\s?{_POWER.format('ten')})?"
    r"(?:\s?/\s?(?P<denominator>[0-9]+))?(?!\w*[0-9]|_|[.,/:^][0-9])"
)
_SCALES = {
    "hundred": 10**2, "thousand": 10**3, "lakh": 10**5, "million": 10**6, "crore": 10**7,
    "billion": 10**9, "trillion": 10**12, "dozen": 12,
    "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12,
    "mn": 10**6, "mln": 10**6, "mio": 10**6, "bn": 10**9, "tn": 10**12, "trn": 10**12,
}  # fmt: skip
_SCALE_WORD = re.compile(
    r"[\s-]?(?P<scale>hundred|thousand|lakh|million|crore|billion|trillion|dozen|mn|mln|mio|bn|tn"
    r"|trn)s?\b",
    re.IGNORECASE,
)
_SCALE_LETTER = re.compile(r"(?P<space>\s?)(?P<scale>[kKmMbBtT])(?![\w^'’])(?P<currency>\s?\$)?")
_EN_DASH_AS_MINUS = re.compile(r"^\s*\u2013|(?<!\d)(?<!\d\s)\u2013(?=\$?[.0-9])")
# Past this a string of digits is degenerate sampling, and int() refuses a few thousand of them.
_MAX_DIGITS = 100

# Number of characters before a number that are searched for what it is a part of.
_NEAR = 40
# Expressions that a number may be part of: "√9", "2 × 3", "|-5|", "twice 9"; "2π", "3x", "3 - x",
# "9 squared".
_PART_BEFORE = re.compile(
    r"[√|~⌊⌈±×÷*/]\s*$|[\w)]\s*[-+]\s*$|[-\u2014\u2015]$|[-+]\s*\(\s*$"
    r"|\b(?:twice|thrice|double|triple|half of|root|sqrt|log|ln|sin|cos|tan|exp|base|mod|modulo)"
    r"(?:\s+of)?[\s(]*$",
    re.IGNORECASE,
)
_PART_BEHIND = re.compile(
    r"\w*\^|(?<=(?<![\d.])0)[xob][0-9a-f]+\b|\s?[*×÷^+~|√π±⌋⌉]|[\u0300-\u036f]|\.?\(|\s,[0-9]|\.{2,}\s?[0-9]|\s?[xyzn](?!\w)|[ij](?!\w)|(?-i:[abcoqruvw])(?!\w)|\s?-\s?(?:[a-z](?!\w)|\()"
    r"|\s?/\s?(?![hsmdglJN](?!\w))[a-z(](?!\w)|\s?(?:pi|squared|cubed|factorial|mod|modulo|grand)\b"
    r"|\s(?:thirds|fourths|fifths|sixths|sevenths|eighths|ninths|(?:ten|hundred|thousand)ths?)\b",
    re.IGNORECASE,
)
_UNKNOWN = re.compile(
    r"\\[a-zA-Z]|(?<![A-Za-z_0-9])[0-9]|[π\u2102\u2115\u211a\u211d\u2124\u2200-\u22ff\u2a00-\u2aff]"
)
# Two numbers of equal value count as one only where the text says that they are the same.
_AGAIN = re.compile(
    r"\(|\s\u2013|\u2014|\bi\.?e\b|\bthat(?: i|['’])s\b|\b(?:or|namely|so|thus|hence|therefore)\b"
    r"|\b(?:exactly|meaning|which is|in total|altogether|in other words)\b",
    re.IGNORECASE,
)
# Bounds and denials.
_NO_STATEMENT = re.compile(
    r"\b(?:not|never|neither|nor|below zero|wrong|incorrect|at (?:least|most)|unlike)\b|n['’]t\b"
    r"|\b(?:more|less|greater|fewer|larger|smaller|higher|lower) than\b"
    r"|\bor (?:more|less|fewer|above|below|higher|lower|greater)\b"
    r"|\b(?:over|under|above|below|beyond|exceeds|up to)\s+(?=[-$.]*[0-9])"
    rf"|{CROSSES}"
    r"|[≤≥≠>]|<(?!/?\w+>|\|)|[0-9]\+(?!\s?[0-9])",
    re.IGNORECASE,
)
# Remarks about a number that stand after it.
_CONTRAST = r"[,;(]?\s*\b(?:rather than|instead of|as opposed to|and not|but not)\b|[,;(]\s*not\b"
_REASON = (
    r"\b(?:because|since|given|due to|where|which"
    r"|(?<!well )(?<!many )(?<!much )as(?! (?:well|many|much)\b))\b"
)
_REMARK = re.compile(rf"{_CONTRAST}|{_REASON}", re.IGNORECASE)
_BRACKETS = re.compile(r"(?<=\s)[(\[]([^()\[\]]*)[)\]]")
_CONDITION = re.compile(
    r"\s*(?:with|where|when|if|since|because|as|given|for|from|ie|not|rounded|see|of|out of)\b"
    r"|[^0-9]*$"
    r"|.*(?:\b(?:each|per|every|apiece)\b|=|[0-9]\s*[+*×]\s*[0-9]|[0-9]\s[-/÷]\s[0-9])",
    re.IGNORECASE,
)
_CORRECTION = re.compile(
    r"\b(?:or|mod|modulo|base|negative|minus|hundreds?|thousands?|millions?|billions?|dozens?)\b|±",
    re.IGNORECASE,
)
# "18 when n = 3 and k = 4"; "x = 3 and y = 4" has two answers.
_ASSIGNMENT = r"[a-zA-Z](?:_?\w)?\s*=\s*-?\.?[0-9](?:[0-9.,/]*[0-9])?"
_ASSIGNMENTS = re.compile(
    rf"\b(?:when|if|for|with|at|by|using|taking|assuming|provided)\s+{_ASSIGNMENT}"
    rf"(?:\s*(?:,|and|,\s*and)\s*{_ASSIGNMENT})*"
)

_ENUMERATION = re.compile(r"[,;](?![0-9])|\b(?:and|or)\b")
_UNIT = r"(?:/\s?)?(?:[a-zA-Z]{2,}|[mgslhL])\b[\s)]*"
_TERM = rf"[-+\s($√]*[0-9.]+[\s)%!$π]*(?:{_UNIT}){{0,3}}"
_ARITHMETIC = re.compile(
    rf"[^0-9(√$+-]*(?P<expression>{_TERM}(?:(?:[-+*/×÷^\u2013]+|(?=\()){_TERM})*)"
)
_FACTORIAL = re.compile(r"[0-9)}]\s?!")
_BARE_INTEGER = re.compile(r"-?[1-9][0-9]{0,17}|0")
_OPERATOR = re.compile(r"(?<=\S)\s*[-+*/×÷^!π\u2013]|√|[0-9]\(")


class NumericTask(Task):
    """A task whose canonical answer is `str(Fraction)`: "1200", "-3", "3/4"."""

    def same(self, predicted: str, answer: str) -> bool:
        value = parse_number(answer)
        if value is None:
            raise ValueError(f"answer must be one number; got {answer!r}")
        return parse_number(predicted) == value

    def _canonical(self, statement: str, example: Mapping[str, Any]) -> str | None:
        values = stated_values(statement)
        if not values:
            return None
        value = values.pop() if len(values) == 1 else None
        return SEVERAL if value is None else str(value)


def parse_number(text: str) -> Fraction | None:
    """Return the one number that a text in figures names by the rule above, or None.

    As in data: "6!" is a factorial there, and not 6 with an exclamation mark.
    """
    # Most answers of most data; all that is looked for in others takes a hundred times as long.
    if _BARE_INTEGER.fullmatch(text):
        return Fraction(int(text))
    if _FACTORIAL.search(text):
        return None
    values = _values(plain_figures(text, words=False))
    return values.pop() if len(values) == 1 else None


def stated_values(statement: str) -> set[Fraction | None]:
    """Return the values that a statement's first sentence names, in figures or words.

    None stands for something without a single value, such as "2π"; the set is empty where the
    sentence names nothing.
    """
    return _values(first_sentence(plain_figures(statement, words=True)))


def _values(sentence: str) -> set[Fraction | None]:
    sentence = _without_remarks(re.sub(r"<\s*([^<>]*[0-9][^<>]*)>", r" \1 ", sentence))
    if _NO_STATEMENT.search(sentence):
        return set()
    *left, stated = re.split(r"=+", sentence)
    if (
        left
        and _NUMBER.search(left[0])
        and not _computes(left[0])
        and all(map(_computes, [*left[1:], stated]))
    ):
        return _values_of_part(left[0])  # "18 = 9 + 9"
    values = _values_of_part(stated)
    for part in left:
        if not _is_arithmetic(part):
            values |= _values_of_part(part)
            if _ENUMERATION.search(part):  # "x = 3, y = 3"
                values.add(None)
    return values


def _values_of_part(part: str) -> set[Fraction | None]:
    part = _EN_DASH_AS_MINUS.sub("-", part)
    values: set[Fraction | None] = set()
    rest, end = "", 0
    for match in _NUMBER.finditer(part):
        value, after = _scaled(match, part)
        values.add(None if _is_part_of_more(match, part, after) else value)
        if end and not _AGAIN.search(part, end, match.start()):
            values.add(None)
        if len(values) > 1:
            return values
        rest += part[end : match.start()] + " "
        end = after
    # Unknown text that is left may change any number, as in "ℝ∖{2}", or be an unclear one: "1,2".
    return values | {None} if _UNKNOWN.search(rest + part[end:]) else values


def _is_part_of_more(match: re.Match[str], part: str, after: int) -> bool:
    """Return whether a number in some text is only a part of a larger expression."""
    before = part[max(0, match.start() - _NEAR) : match.start()]
    if _PART_BEFORE.search(before) or _PART_BEHIND.match(part, after):
        return True
    if "." in match["magnitude"] and part.startswith("..", after):  # "0.333..."
        return True
    spaced_sign = match[0][:2] in ("- ", "+ ")
    operand = r"[\w)]\s*$" if spaced_sign else r"(?<![\w'’])[a-zA-Z]\s*$"  # "10 - 3", "x -3"
    return bool(match["sign"]) and re.search(operand, before) is not None


def _scaled(match: re.Match[str], text: str) -> tuple[Fraction | None, int]:
    """Return the value of a number with its scale, as in "$2.5 million", and where it ends."""
    value, end = _value(match), match.end()
    while scale := _SCALE_WORD.match(text, end):
        value = None if value is None else value * _SCALES[scale["scale"].lower()]
        end = scale.end()
    letter = _SCALE_LETTER.match(text, end)
    if letter is None:
        return value, end
    spelled, spaced = letter["scale"], bool(letter["space"])
    money = "$" in match[0] or letter["currency"] is not None
    if money or (spelled in "kKM" and not spaced):
        unknown = spelled == "t"
        factor = _SCALES[spelled.lower()]
        return None if value is None or unknown else value * factor, letter.end()
    # Metres, tons, minutes and Kelvin are units; billions and bytes cannot be told apart.
    is_unit = spelled in ("m", "t") or (spelled == "K" and spaced)
    return value if is_unit else None, end


def _value(match: re.Match[str]) -> Fraction | None:
    if match.end() - match.start() > _MAX_DIGITS:
        return None
    value = Fraction(re.sub(r"[,'’_]", "", match["magnitude"]))
    power = match["power"] or match["power_in"]
    ten = match["ten"] or match["ten_in"]
    if power is not None:
        # The length of the canonical form is bounded before the power is computed.
        if abs(int(power)) * len(match["magnitude"]) > _MAX_DIGITS or (
            not value and int(power) < 0
        ):
            return None
        value **= int(power)
    if ten is not None:
        value *= Fraction(10) ** int(ten)
    if match["denominator"] is not None:
        denominator = int(match["denominator"])
        if denominator == 0:
            return None
        value /= denominator
    if match["whole"] is not None:
        if not 0 < value < 1:
            return None
        value += int(match["whole"])
    if match["sign"] and match["inner_sign"]:
        return None
    value = -value if "-" in (match["sign"], match["inner_sign"]) else value
    # "1e999" is short, but its canonical form is not, and has to be read again.
    return value if len(str(value)) <= _MAX_DIGITS else None


def _without_remarks(sentence: str) -> str:
    """Return the sentence without remarks about its first number."""
    first = _NUMBER.search(sentence)
    if first is None:
        return sentence
    head, tail = sentence[: first.end()], sentence[first.end() :]
    tail = _BRACKETS.sub(_kept_brackets, tail)
    tail = _REMARK.split(tail, maxsplit=1)[0]
    return head + _ASSIGNMENTS.sub(" ", tail)


def _kept_brackets(match: re.Match[str]) -> str:
    if _CORRECTION.search(match[1]):
        return UNREADABLE
    return " " if _CONDITION.match(match[1]) else match[0]


def _is_arithmetic(part: str) -> bool:
    """Return whether an "=" after this text gives its value: it computes, or has no number."""
    if not _NUMBER.search(part):
        # "3x = 18" and "x² = 18" have a number all the same.
        return not re.search(r"(?<![\w.(])[0-9]|[\^√]", part)
    return _computes(part)


def _computes(part: str) -> bool:
    part = re.sub(r"(?<=[0-9]),(?=[0-9]{3})", "", part)
    part = re.sub(r"(?<=[0-9%])\s+of\s+(?=\$?[0-9])", " × ", part)
    match = _ARITHMETIC.fullmatch(part)
    return match is not None and _OPERATOR.search(match["expression"]) is not None
