"""Answers that are mathematics: expressions, sets, intervals, equations, matrices.

`numeric` reads a single number, exactly. math-verify (the extra "math") reads and compares the
rest, in a process of its own (`math_worker`): SymPy may compute for ever, and math-verify's own
time limit works only in a program's main thread. An answer that takes longer than five seconds does
not count. Decimals are turned into fractions first, so that nothing is rounded.
"""

from __future__ import annotations

import importlib
import os
import re
import threading
from itertools import pairwise
from pathlib import Path

from latro.worker import Worker, WorkerEndedError

from .base import SEVERAL
from .markup import first_sentence, folded
from .numeric import stated_values

_WORKER = Path(__file__).with_name("math_worker.py")

_SEGMENT = re.compile(
    r"\$\$(.+?)\$\$|(?<!\\)\\\[(.+?)\\\]|(?<!\\)\\\((.+?)\\\)|(?<!\\)\$([^$\n]+?)(?<!\\)\$",
    re.DOTALL,
)
_PLACE = re.compile(r"\0(\d+)\0")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*)\}")
_BETWEEN = re.compile(r"[\s,]*(?:\b(?:and|or)\b)?[\s,]*")
_DENIAL = re.compile(r"\b(?:not|never|neither|nor)\b|n['’]t\b", re.IGNORECASE)
_REMARK = re.compile(r"\b(?:because|since|where|with|when|which|for)\b|[,;]\s*not\b", re.IGNORECASE)
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}")
_FUNCTIONS = {
    name: rf"\{name} "
    for name in ("sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "pi", "infty")
} | {"infinity": r"\infty ", "or": r"\text{ or }", "and": r"\text{ and }"}
# "3 \text{ or } 4", as data has it without dollars.
_JOINT = re.compile(r"\\(?:text|textrm|mbox|mathrm)\s*\{\s*(and|or)\s*\}")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\s*\{[a-z]*\*?\}")
_ROOT = re.compile(r"(?<!\\)(?:sqrt|√)\s*(?:\(([^()]*)\)|(\w))")
_SIGNS = str.maketrans(
    {
        "π": r"\pi ", "∞": r"\infty ", "×": r"\cdot ", "·": r"\cdot ", "∅": r"\emptyset ",
        "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "±": r"\pm ",
    }
)  # fmt: skip
_EMPTY_SET = re.compile(r"\\varnothing(?![a-zA-Z])|\\\{\s*\\\}")
# In prose "!" may end a sentence: "18!" is 18.
_FACTORIAL = re.compile(r"[\w)}\]]\s*!(?!\s*=)")
_FACTORIAL_IN_PROSE = re.compile(r"(?<![\w$])\w+!(?!\s*=)")
_GROUPS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:,|\{,\}|\\,|\\!,|,\\!)\d{3})+(?![\d,])")
_DECIMAL = re.compile(r"(?<![\d.])(\d*)\.(\d+)")


class MathReader:
    """Reads mathematics; it starts its process at the first answer that needs it.

    Raises:
        ValueError: math-verify is not installed.
    """

    def __init__(self) -> None:
        try:
            importlib.import_module("math_verify")
        except ImportError as error:
            raise ValueError(
                "grader: math needs the package math-verify, pip install 'latro-kernels[math]'; "
                f"got {error}"
            ) from error
        self._lock = threading.Lock()
        self._worker: Worker | None = None
        self._read: dict[tuple[str, str], str | None] = {}

    def stated(self, statement: str, truth: str) -> str | None:
        """Return the canonical string of a statement's answer, the truth's where they are equal.

        Return None where it states no answer, and `SEVERAL` where it states more than one.
        """
        if _FACTORIAL.search(truth) and not _segments(statement):
            marked = _FACTORIAL_IN_PROSE.sub(r"$\g<0>$", statement)
            if marked != statement and self.stated(marked, truth) == self.truth(truth):
                return self.truth(truth)
        values = stated_values(statement)
        factorial = any(_FACTORIAL.search(segment) for segment in _segments(statement))
        if len(values) == 1 and None not in values and not factorial:
            return str(values.pop())  # SymPy spells it in the same way
        latex = _mathematics(statement)
        if not latex:
            return latex if latex == SEVERAL or not values else SEVERAL
        return self._spelled(latex, _mathematics(_as_mathematics(truth))) or SEVERAL

    def truth(self, answer: str) -> str | None:
        """Return the canonical string of an answer in the data; None where it cannot be read."""
        return self.stated(_as_mathematics(answer), answer) or None

    def _spelled(self, latex: str, truth: str | None) -> str | None:
        key = (latex, truth or "")
        with self._lock:
            if key not in self._read:
                self._read[key] = self._asked(*key)
            return self._read[key]

    def _asked(self, latex: str, truth: str) -> str | None:
        if self._worker is None or self._worker.owner != os.getpid():
            self._worker = Worker(_WORKER)
        try:
            return self._worker.ask({"truth": truth, "stated": latex})
        except WorkerEndedError:  # its alarm or its memory limit ended it
            self._worker = None
            return None


def _as_mathematics(answer: str) -> str:
    """Return an answer of the data, with factorials marked as such: there "!" ends no sentence."""
    plain = _FACTORIAL.search(answer) and not any(_segments(answer))
    return f"${answer.strip()}$" if plain else answer


def _segments(text: str) -> list[str]:
    """Return the parts of a text that are marked as mathematics."""
    found = [*_SEGMENT.finditer(text), *_BOX.finditer(text)]
    return [next(group for group in match.groups() if group is not None) for match in found]


def _mathematics(statement: str) -> str | None:
    """Return the mathematics of a statement's first sentence as LaTeX, or None."""
    segments: list[str] = []

    def masked(match: re.Match[str]) -> str:
        segments.append(next(group for group in match.groups() if group is not None))
        return f"\0{len(segments) - 1}\0"

    text = _SEGMENT.sub(masked, statement)
    text = first_sentence(_BOX.sub(masked, text).replace("**", ""))
    text = _REMARK.split(text, maxsplit=1)[0]
    places = list(_PLACE.finditer(text))
    if _DENIAL.search(text[: places[0].start()] if places else text):
        return None
    if not places:
        return _from_plain_text(text)
    held = [segments[int(place[1])] for place in places]
    gaps = [text[a.end() : b.start()] for a, b in pairwise(places)]
    if len(set(held)) > 1 and not all(_BETWEEN.fullmatch(gap) for gap in gaps):
        return SEVERAL
    return ",".join(_exact(_inside_box(latex)) for latex in dict.fromkeys(held))


def _inside_box(latex: str) -> str:
    box = _BOX.search(latex)
    return box[1] if box else latex


def _from_plain_text(sentence: str) -> str | None:
    text = _JOINT.sub(r" \1 ", folded(sentence.strip(" *_`$.,;:")))
    words = _WORD.findall(_ENVIRONMENT.sub("", text))
    if not text or any(word.lower() not in {*_FUNCTIONS, "sqrt"} for word in words):
        return None
    text = _WORD.sub(lambda m: _FUNCTIONS.get(m[0].lower(), m[0]), text)
    text = text.replace("<=", r"\le ").replace(">=", r"\ge ").replace("**", "^")
    return _exact(text.replace("*", r"\cdot "))


def _exact(latex: str) -> str:
    """Return the LaTeX with commands for signs, decimals as fractions and thousands ungrouped."""
    text = _ROOT.sub(lambda m: rf"\sqrt{{{m[1] or m[2]}}}", folded(latex.strip()))
    text = _EMPTY_SET.sub(lambda _: r"\emptyset ", text.translate(_SIGNS))
    text = _GROUPS.sub(lambda m: re.sub(r"\D", "", m[0]), text)
    return _DECIMAL.sub(lambda m: rf"\frac{{{int(m[1] + m[2])}}}{{{10 ** len(m[2])}}}", text)
