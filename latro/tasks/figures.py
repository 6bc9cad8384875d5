"""Rewrite numbers of any spelling in the one spelling that `numeric` reads.

`plain_figures` removes markup (`markup`) and calculator annotations, and writes groups with commas,
fractions as "3/4", powers as "10^(6)", multiplication as "×", any currency as "$", any arrow or
sign of approximation as "=". A LaTeX command that is left after that, a backslash and a name, is
unknown.
"""

from __future__ import annotations

import re
import unicodedata

from .markup import TAG, folded, unmarked
from .number_words import with_figures

# Non-breaking and thin spaces, and their LaTeX commands.
_GROUP_MARK = re.compile(
    r"(?<=\d)(?:[\u00a0\u2007-\u200a\u202f]|\\[,;: ]|\\thinspace\s?|\{(?:,|\\,|\\ )\}|,\\!|\\!,)"
    r"(?=\d{3}(?!\d))"
)
# "1 000 000"; "12 500" with a space that may break may be two numbers.
_SPACED_GROUPS = re.compile(r"(?<![\w.,])\d{1,3}(?: \d{3})* 000(?![\d.,]?\d)")
_FRACTION = re.compile(
    r"\\[dtc]?frac\s*(?:\{\s*(-?\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))|\{\s*(-?\d+)\s*\\over\s+(\d+)\s*\}"
)
_COMMANDS = {
    "×": "times|cdot|ast", "÷": "div", "±": "pm|mp", "√": "sqrt", "π": "pi", "°": "degree",
    "≤": "leq?|leqslant|lt", "≥": "geq?|geqslant|gt", "≠": "neq?", "$": "pounds|euro|yen|cent",
    "=": "approx|simeq|sim|cong|equiv|to|rightarrow|Rightarrow|longrightarrow|implies|in",
}  # fmt: skip
_COMMAND = {re.compile(rf"\\(?:{names})(?![a-zA-Z])"): sign for sign, names in _COMMANDS.items()}
_DEGREES = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})")
_ORDINAL = re.compile(r"(?<=[0-9])\s?\^\s?(?:\{\s*)?(?:st|nd|rd|th)\b\s*\}?")
_SIGNS = str.maketrans(dict.fromkeys("⋅·∙•✕✖", "×") | dict.fromkeys("≈≃≅∼≡∈→⇒➔➜⟶⟹", "="))
# "1. 18 pens" may be a list's first item or the answer 1 and another sentence.
_NUMBERED = re.compile(r"(?<=\n)[ \t]*1[.)][ \t]+(?=\S)")
# GSM8K's solutions have these before each result: "10 + 8 = <<10+8=18>>18".
_CALCULATOR_MARK = re.compile(r"<<[^<>]*=[^<>]*>>")
_TIE = re.compile(r"~(?=[a-zA-Z])")
_UNEQUAL = re.compile(r"(?<![0-9)])!=")
_TIMES = re.compile(r"(?<=[0-9])(?<!\b0)\s?[xX]\s?(?=\$?[0-9])")
_ARROW = re.compile(r"[-=]+>")
_ABOUT = re.compile(r"(?<![\d\w)])(?:\s*)~(?=\s?\$?-?[.\d])")
_RAISED = re.compile(r"(?:\^|\*\*)\s*\{([^{}]*)\}")
_LOWERED = re.compile(r"_\s*\{([^{}]*)\}")
_UNIT_POWER = re.compile(
    r"(?<![a-zA-ZµμΩ°])([a-zA-ZµμΩ°]+)\.?\s?(?:\^|\*\*)\s?(?:[({]\s?-?\d+\s?[)}]|-?\d+)"
)
_VARIABLES = frozenset("xyznei")
_UNIT_DIGIT = re.compile(r"(?<=\d)(\s?(?:mm|cm|dm|km|m|ft|in|yd))[23](?!\w)")
_CURRENCY_CODE = re.compile(
    r"\b(?:USD|EUR|GBP|JPY|INR|CHF|CAD|AUD|CNY|RMB|Rs\.?)\s?(?=[-.\d])"
    r"|(?<![0-9])(?<![0-9] )\b[A-Z]{1,2}(?=\$)"
)
_OPERATOR_WORDS = {
    re.compile(r"\b(?:minus|negative)\s+(?=\$?\s?[.\d])", re.IGNORECASE): "-",
    re.compile(r"\bminus\b", re.IGNORECASE): "-",
    re.compile(r"\bplus\b", re.IGNORECASE): "+",
    re.compile(r"(?<=\d)\s+(?:times|multiplied by)\s+(?=\$?[.\d])", re.IGNORECASE): " × ",
    re.compile(r"(?<=\d)\s+divided by\s+(?=\$?[.\d])", re.IGNORECASE): " ÷ ",
    re.compile(r"(?<=\d)\s+over\s+(?=\d)", re.IGNORECASE): "/",
    re.compile(r"\b(?:equals|is equal to)\b", re.IGNORECASE): "=",
}
_AND_A_FRACTION = re.compile(r"(?<=\d)\s+and\s+(?=\d+/\d+(?![\d/]))")
_ABBREVIATION = re.compile(
    r"\b(approx|ca|rs|no|viz|est|sq|cu|i\.e|e\.g|u\.s|u\.k)\.(?=\s)", re.IGNORECASE
)


UNREADABLE = r" \number "
"""Stands for a number whose value is unclear; it reads like an unknown LaTeX command."""


def plain_figures(text: str, *, words: bool) -> str:
    """Return the text with its numbers, signs and operators in one spelling.

    Args:
        text: a statement, or an answer from the data.
        words: whether to turn numbers in words into figures.
    """
    text = unmarked(_GROUP_MARK.sub(",", _CALCULATOR_MARK.sub("", text)))
    text = TAG.sub("\n", _NUMBERED.sub(lambda _: UNREADABLE, folded(text).translate(_SIGNS)))
    text = _ORDINAL.sub("th", _DEGREES.sub("°", text))
    text = _TIMES.sub(" × ", _UNEQUAL.sub("≠", _TIE.sub(" ", text)))
    text = _FRACTION.sub(_fraction, text)
    for pattern, sign in _COMMAND.items():
        text = pattern.sub(f" {sign} ", text)
    text = _LOWERED.sub(r"_\1", _RAISED.sub(r"^(\1)", text))
    text = _UNIT_POWER.sub(_without_power, text)
    text = _UNIT_DIGIT.sub(r"\1", text)
    text = _ABOUT.sub(" ", _ARROW.sub("=", text))
    text = "".join("$" if unicodedata.category(c) == "Sc" else c for c in text)
    text = _CURRENCY_CODE.sub(lambda m: "" if text[m.end() : m.end() + 1] == "$" else "$", text)
    text = _ABBREVIATION.sub(lambda m: m[1].replace(".", ""), text)
    if words:
        text = with_figures(text)
    for pattern, sign in _OPERATOR_WORDS.items():
        text = pattern.sub(sign, text)
    text = _AND_A_FRACTION.sub(" ", text)
    text = _SPACED_GROUPS.sub(lambda m: m[0].replace(" ", ","), text)
    return re.sub(r"[ \t{}]+", " ", text)


def _fraction(match: re.Match[str]) -> str:
    numerator, denominator = (part for part in match.groups() if part is not None)
    return f" {numerator}/{denominator} "


def _without_power(match: re.Match[str]) -> str:
    return match[0] if match[1] in _VARIABLES else match[1]
