"""Find where a text states an answer: one rule for sampling, joining, scoring and grading.

The words of an answer template ("The answer is") open a statement. Case does not matter, nor does
white space around the template: "So the answer is 5" states 5. Where a template begins or ends in a
word, that must be a whole word of the text: "The answer isn't 5", "The answer is5" and "canswer: 5"
state nothing, while "Answer:5" and "####5" do. Scripts that put no space between words have no such
border: in "答案是5" the template is 答案是.
"""

from __future__ import annotations

import re

# Thai and Lao, Burmese, Khmer, kana, and Chinese characters.
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"


MOST_STOP_STRINGS = 4
"""A vLLM server refuses a request with more, unless it was started with a higher limit."""


def template_pattern(template: str) -> re.Pattern[str]:
    """Return the pattern that every statement's template matches, in the order of the text.

    The statement follows at `match.end()`.

    Raises:
        ValueError: `template` is white space alone.
    """
    words = template.strip()
    if not words:
        raise ValueError(f"answer_template: expected words, got {template!r}")
    # A digit or an underscore may touch the first word: "= 5The answer is", "_The answer is 5_".
    begin = r"(?<![^\W\d_])" if _begins_in_a_word(words) else ""
    end = r"(?![\w'’])" if ends_in_a_word(words) else ""
    return re.compile(begin + re.escape(words) + end, re.IGNORECASE)


def ends_in_a_word(template: str) -> bool:
    """Return whether a template's last word is known to be whole only by the next character."""
    return re.search(rf"(?![{_UNSPACED}])\w\s*\Z", template) is not None


def ending_pattern(text: str) -> re.Pattern[str]:
    """Return the pattern that ends a completion once it matches the text written so far.

    A template that ends in a word is whole only once the next character shows it: "The answer is"
    may go on to "isn't". Half of a character does not count; it decodes to U+FFFD.

    Args:
        text: an answer template, or the end of a block of thoughts; or white space, which is
            matched literally.
    """
    if text.isspace():
        return re.compile(re.escape(text))
    decided = "(?=.*[^\ufffd])" if ends_in_a_word(text) else ""
    return re.compile(template_pattern(text).pattern + decided, re.IGNORECASE | re.DOTALL)


def stop_strings(text: str) -> list[str]:
    """Return strings, each of which matches `ending_pattern`, for a server that stops at strings.

    Servers take only a few, so these are the likeliest spellings. A completion that spells the
    template in another way runs on behind it, longer than need be.
    """
    if text.isspace():
        return [text]
    words = text.strip()
    before = (" ", "\n") if _begins_in_a_word(words) else ("",)
    behind = (" ", ":") if ends_in_a_word(words) else ("",)
    cases = dict.fromkeys((words, words[0].swapcase() + words[1:]))
    return [b + case + e for e in behind for case in cases for b in before][:MOST_STOP_STRINGS]


def _begins_in_a_word(template: str) -> bool:
    return re.match(rf"(?![{_UNSPACED}])[^\W\d_]", template) is not None
