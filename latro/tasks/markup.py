r"""Remove markup from a text: LaTeX, Markdown, HTML and Unicode variants of characters.

Graders run two stages before they read a statement:

- `unmarked` removes markup around words and numbers: "\boxed{B}", "**B**", "$$\n18\n$$";
- `folded` replaces variants of a character by one: "Ｂ" and "Ⓑ" are B, "10⁶" is "10^{6}".

`first_sentence` then cuts a statement at the end of its first sentence.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable

_BRACED = r"\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"
CROSSES = "[✗✘❌❎🚫]"
"""Signs that call wrong what they stand at."""
TAG = re.compile(r"</?(?:[a-zA-Z]\w+|s)\s?/?>|</[a-zA-Z]>|<\|[^<>|]*\|>|\[/?INST\]")
"""A token that ends a turn, or a tag that stands alone; "<B>" is left, as it may be an option."""

_MARK = re.compile(r"[\\$`*_~<{}&\n]")
_FENCE = re.compile(r"```(?:[\w+-]*\n)?(.*?)```", re.DOTALL)
_LINE_BREAK_TAG = re.compile(r"<br\s*/?>", re.IGNORECASE)
_ELEMENT = re.compile(r"<([a-zA-Z]+)(?:\s[^<>]*)?>([^<>]*)</\1>")
_STRUCK_ELEMENTS = ("del", "s", "strike")
_STRUCK = re.compile(
    r"~~(?=\S)[^~]+(?<=\S)~~|\\(?:cancel|bcancel|xcancel|sout|st)\s*\{[^{}]*\}|"
    r"\\(?:tag|label|hspace|vspace|phantom)\*?\s*\{[^{}]*\}"
)
_DISPLAY = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\\\[(.+?)\\\]|(?<!\\)\\\((.+?)\\\)", re.DOTALL)
# Pandoc's rule: no white space inside and no digit after it, so "$5 and $6" are two prices.
_INLINE = re.compile(r"(?<!\\)\$(?=\S)([^$\n]+?)(?<=[^\s\\])\$(?!\d)")
_DELIMITER = re.compile(r"\\[\[\]()]|\$\$")
_ENVIRONMENT_BODY = re.compile(r"\\begin\s*\{(\w+\*?)\}.*?\\end\s*\{\1\}", re.DOTALL)
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\s*\{[^{}]*\}(?:\{[lcr|]*\})?|(?<!\\)&")
_LINE_BREAK = re.compile(r"\\\\(?:\[[^\]]*\])?")
_BOX = re.compile(rf"\\(?:boxed|fbox|framebox)\s*{_BRACED}")
_COLOUR = re.compile(r"\\(?:textcolor|colorbox|color)\s*\{[^{}]*\}")
_STYLE = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|sc|sl|up|normal|md)?|math(?:bf|it|rm|sf|tt|bb|cal|scr|normal|frak)"
    rf"|mbox|emph|underline|operatorname|boldsymbol|bm|ensuremath|num)\*?\s*{_BRACED}"
)
_SWITCH = re.compile(
    r"\\(?:(?:left|right)\.?|displaystyle|textstyle|[bB]igg?[lrm]?|bf|it|rm|tt|sf|em|bfseries"
    r"|[lL]arge|LARGE|[hH]uge|small|centering|therefore|hline|nonumber|notag)(?![a-zA-Z])"
)
_SPACE = re.compile(
    r"\\(?:[,;: ]|(?:quad|qquad|thinspace|enspace|medspace|space|newline|noindent|par)(?![a-zA-Z]))"
)
_ESCAPED = re.compile(r"\\([$%#&_{}*`~])")
# An asterisk that stands between two operands multiplies; any other is Markdown's.
_ASTERISKS = re.compile(r"(?<=[\w)}\]])\*{1,2}(?=[\w({\\$]|\.\d)|(?<=[^\s*] )\*(?= [^\s*])|(\*+)")
_UNDERSCORES = re.compile(r"(?<![^\W_])_+|_+(?![^\W_]|\{)")
_BULLET = r"[ \t]*[-*+•‣◦▪–—][ \t]+"
_NEXT_ITEM = re.compile(rf"(?<=\n)({_BULLET}[^\n]*?)[ \t]*\n+(?={_BULLET})")
_LINE_MARKS = re.compile(rf"(?<=\n)(?:{_BULLET}|[ \t]*(?:\#{{1,6}}|>)[ \t]+)")

_VULGAR = "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
_RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻"
_LOWERED = "₀₁₂₃₄₅₆₇₈₉"
# The letters in dark circles and squares, which Unicode's compatibility forms leave as they are.
_DARK_LETTERS = {
    first + i: chr(ord("A") + i) for first in (0x1F150, 0x1F170) for i in range(26)
} | {0xFE0F: None}
# Minus signs, and the decimal, thousands and percent signs of Arabic digits.
_SIGNS = str.maketrans(
    dict.fromkeys("\u2010\u2011\u2012\u2212\ufe63\uff0d", "-")
    | {"\u066b": ".", "\u066c": ",", "\u066a": "%"}
)

# A closing quote or bracket belongs to its sentence; a capital letter after it begins the next one,
# since base models write "5.Question:". Neither "3! = 6" nor "20? No, 18" ends at "!" or "?".
_SENTENCE_END = re.compile(
    r"[.!](?=[\"'”’)\]]*(?:\s|$)|[A-Z][a-z])(?!\s*=)|\?(?=[\"'”’)\]]*[ \t]*(?:\n|$))|\u3002|\n"
)
_LINE_END = re.compile("\n")


def unmarked(text: str) -> str:
    """Return the text without LaTeX, Markdown and HTML markup, and without text struck through.

    Bullets and headings are removed from every line but the first: that is the rest of the line
    with the answer template, where "- 3" is a number.
    """
    if _MARK.search(text) is None:
        return text
    text = _FENCE.sub(r"\1", html.unescape(text))
    text = _LINE_BREAK_TAG.sub("\n", text)
    text = _repeated(_ELEMENT, _element, text)
    text = _STRUCK.sub(" ", text).replace("`", "")
    text = _inside_its_braces(text)
    text = _DISPLAY.sub(lambda m: _on_one_line(m[1] or m[2] or m[3]), text)
    text = _ENVIRONMENT_BODY.sub(lambda m: _on_one_line(m[0]), text)
    text = _INLINE.sub(r"\1", text)
    text = _DELIMITER.sub(" ", text)
    text = _LINE_BREAK.sub("\n", text)
    text = _ENVIRONMENT.sub(" ", text)
    text = _COLOUR.sub("", text)
    text = _SWITCH.sub(" ", text).replace("\\!", "")
    text = _SPACE.sub(" ", text)
    text = _repeated(_STYLE, _styled, text)
    text = _repeated(_BOX, lambda m: f" {m[1].strip()} ", text)
    text = re.sub(r"\\boxed\s*\{?", " ", text)  # without braces, or cut off
    # A list of several items is one statement that names them all.
    text = _NEXT_ITEM.sub(r"\1; ", text)
    text = _LINE_MARKS.sub("", text)
    text = _ASTERISKS.sub(lambda m: "" if m[1] else m[0], text)
    text = _ESCAPED.sub(r"\1", text)
    return _UNDERSCORES.sub("", text)


def folded(text: str) -> str:
    """Return the text in Unicode's compatibility forms, signs of numbers and digits in ASCII.

    Raised digits become "^{2}", lowered ones "_{2}" and "½" becomes " 1/2", which those forms
    would run into the number before them.
    """
    if text.isascii():
        return text
    text = re.sub(f"[{_RAISED}]+", lambda m: f"^{{{m[0]}}}", text)
    text = re.sub(f"[{_LOWERED}]+", lambda m: f"_{{{m[0]}}}", text)
    text = re.sub(f"[{_VULGAR}]", r" \g<0>", text).translate(_DARK_LETTERS)
    text = unicodedata.normalize("NFKC", text).translate(_SIGNS).replace("\u2044", "/")
    return "".join(
        str(unicodedata.decimal(c)) if c.isdecimal() else c
        for c in text
        if unicodedata.category(c) != "Cf"  # a zero-width space or joiner, a soft hyphen
    )


def without_marks(text: str, marks: str) -> str:
    """Return the text without these marks around it; the point of ".5" is none."""
    bare = text.strip(marks)
    before = text[: text.find(bare)]
    has_point = bare[:1].isdecimal() and before.endswith(".") and not before.endswith("..")
    return f".{bare}" if has_point else bare


def first_sentence(statement: str) -> str:
    """Return the rest of the sentence that an answer template began, without the closing mark.

    A sentence ends with its line, unless that ends in a colon, or at ".", "!" or "?".
    """
    return _through_colons(statement.lstrip(" \t\r\n:"), _SENTENCE_END)


def first_line(text: str) -> str:
    """Return the first line of a text, with the next line too where it ends in a colon."""
    return _through_colons(text, _LINE_END)


def _through_colons(text: str, ends: re.Pattern[str]) -> str:
    """Return the text up to the first of `ends`, and up to the next while it ends in a colon."""
    rest = text
    parts: list[str] = []
    while not parts or parts[-1].endswith(":"):
        part = ends.split(rest, maxsplit=1)[0]
        if not part.strip():
            break
        parts.append(part.strip())
        rest = rest[len(part) :].lstrip()
    return " ".join(parts)


def _repeated(
    pattern: re.Pattern[str], replacement: Callable[[re.Match[str]], str], text: str
) -> str:
    """Substitute until nothing matches, since markup may stand inside markup."""
    count = 1
    while count:
        text, count = pattern.subn(replacement, text)
    return text


def _element(match: re.Match[str]) -> str:
    if match[1].lower() in _STRUCK_ELEMENTS:
        return " "
    return f"^{{{match[2]}}}" if match[1].lower() == "sup" else match[2]


def _on_one_line(mathematics: str) -> str:
    content = " ".join(_LINE_BREAK.sub(" ", mathematics).split())
    # A minus at the beginning of a line of mathematics is not a bullet.
    content = re.sub(r"^([-+]) ", r"\1", content)
    return f" {content} "


def _styled(match: re.Match[str]) -> str:
    # A space keeps the digits apart from digits beside the braces.
    content = match[1]
    return f" {content} " if content[:1].isdigit() or content[-1:].isdigit() else content


def _inside_its_braces(text: str) -> str:
    """Return the text up to an unmatched closing brace, whose opening brace the template has."""
    start = depth = 0
    for found in re.finditer(r"(?<!\\)[{}]", text):
        depth += 1 if found[0] == "{" else -1
        if depth < 0:
            if text[start : found.start()].strip():
                return text[start : found.start()]
            start, depth = found.end(), 0
    return text[start:]
