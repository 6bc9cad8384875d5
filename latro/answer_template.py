"""Where a text states an answer: one rule for what samples, joins, scores and grades.

The words of an answer template ("The answer is") open a statement. Case does not matter, nor does
white space around the template: "So the answer is 5" states 5. A template that begins or ends in a
word is words of its own there: "The answer isn't 5", "The answer is5" and "canswer: 5" state
nothing, while "Answer:5" and "####5" do. Scripts that put no space between words have no such
border: in "答案是5" the template is 答案是.
"""

from __future__ import annotations

import re

# Thai and Lao, Burmese, Khmer, kana, and Chinese characters.
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"


def template_pattern(template: str) -> re.Pattern[str]:
    """Return the pattern that every statement's template matches, in the order of the text.

    What is stated stands behind `match.end()`.

    Raises:
        ValueError: `template` is white space alone.
    """
    words = template.strip()
    if not words:
        raise ValueError(f"answer_template: expected words, got {template!r}")
    # A digit or an underscore may touch the first word: "= 5The answer is", "_The answer is 5_".
    begin = r"(?<![^\W\d_])" if re.match(rf"(?![{_UNSPACED}])\w", words) else ""
    end = r"(?![\w'’])" if ends_in_a_word(words) else ""
    return re.compile(begin + re.escape(words) + end, re.IGNORECASE)


def ends_in_a_word(template: str) -> bool:
    """Return whether the next character decides if the words of a template are whole."""
    return re.search(rf"(?![{_UNSPACED}])\w\s*\Z", template) is not None
