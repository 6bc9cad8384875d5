"""Read mathematics with math-verify in a process of its own: a line of JSON in, a line out.

The argument is sys.path as JSON.

    {"truth": "x(x+1)", "stated": "x^2+x"}  ->  "x**2 + x"

The line out is the canonical string of the statement (the truth's string where the two are equal),
or null where the statement cannot be read. SymPy may compute for ever, even where no exception can
interrupt it, so an alarm ends this process when an answer takes too long. `mathematics` then starts
another.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys
from contextlib import suppress
from functools import lru_cache
from typing import Any

sys.path[:] = json.loads(sys.argv[1])
import sympy  # noqa: E402
from latex2sympy2_extended.logic import And  # noqa: E402
from math_verify import LatexExtractionConfig, parse, verify  # noqa: E402

_SECONDS = 5
_MEMORY = 4 * 2**30
_LATEX = [LatexExtractionConfig()]
# The errors that SymPy raises where it cannot compute.
_FAILURES = (
    ArithmeticError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RecursionError,
    TypeError,
    ValueError,
)
_PRECISION = 60


def main() -> None:
    """Answer the lines of standard input until it ends."""
    logging.disable()  # math-verify warns of a missing timeout; the alarm is the timeout here
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    for line in sys.stdin:
        request = json.loads(line)
        signal.alarm(_SECONDS)
        answer = canonical(request["truth"], request["stated"])
        signal.alarm(0)
        print(json.dumps(answer), flush=True)


def canonical(truth: str, stated: str) -> str | None:
    """Return the string that all spellings of a statement share, or None."""
    expression, right = _read(stated), _read(truth)
    if expression is None:
        return None
    if right is not None and _are_equal(right, expression):
        expression = right
    return _spelled(expression)


@lru_cache(maxsize=4096)
def _read(latex: str) -> Any:
    """Return the expression of some LaTeX without a name it is assigned to: "x = 3" is 3."""
    try:
        found = parse(f"${latex}$", _LATEX, fallback_mode="no_fallback", parsing_timeout=None)
        expression = found[0] if found else None
        if isinstance(expression, sympy.Eq) and expression.lhs.is_Symbol:
            expression = expression.rhs
    except _FAILURES:
        return None
    # "(3, 1)" is read as an interval, which is empty, whatever its ends are.
    empty = isinstance(expression, sympy.Set) and expression.is_empty
    undefined = expression in (sympy.nan, sympy.zoo)
    return None if undefined or (empty and "empty" not in latex) else expression


def _are_equal(right: Any, stated: Any) -> bool:
    # math-verify takes the right side of any equation, so that "x + 3 = 10" would be 10, and a set
    # of two numbers for the interval between them.
    for kind in (sympy.Eq, sympy.Interval, sympy.FiniteSet, sympy.Tuple):
        one_of_them = isinstance(right, kind) != isinstance(stated, kind)
        if one_of_them and not _is_inequality(right) and not _is_inequality(stated):
            return False
    try:
        return verify(
            right, stated, allow_set_relation_comp=True, timeout_seconds=None
        ) and not _differ(right, stated)
    except _FAILURES:
        return False


def _is_inequality(expression: Any) -> bool:
    return isinstance(expression, sympy.core.relational.Relational | And) and not isinstance(
        expression, sympy.Eq
    )


def _differ(a: Any, b: Any) -> bool:
    """Return whether two constants differ in digits that math-verify does not compare."""
    if not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr)):
        return False
    if not (a.is_number and b.is_number):
        return False
    size = max(abs(sympy.N(a, _PRECISION)), abs(sympy.N(b, _PRECISION)))
    return bool(abs(sympy.N(a - b, _PRECISION, maxn=1000)) > size * sympy.Rational(1, 10**40))


def _spelled(expression: Any) -> str:
    with suppress(*_FAILURES):  # or it stays as it was written
        expression = sympy.simplify(expression.doit())
    return " ".join(sympy.sstr(expression).split())


if __name__ == "__main__":
    main()
