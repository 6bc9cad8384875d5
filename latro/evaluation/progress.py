"""The progress bar of evaluations: problems, accuracies so far, and how sampling goes."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType

from latro.rollout.sequences import Progress
from latro.terminal import progress_bar

# In a file, one line every ten seconds is enough.
_SECONDS_ON_A_TERMINAL = 0.1
_SECONDS_IN_A_FILE = 10.0


class EvaluationBar:
    """A progress bar over problems, which also moves while an engine samples.

    Args:
        title: what is done.
        total: number of problems.
        done: number of problems that are done already.
        shown: whether there is a bar at all.
    """

    def __init__(self, title: str, *, total: int, done: int, shown: bool) -> None:
        self._interval = _SECONDS_ON_A_TERMINAL if sys.stderr.isatty() else _SECONDS_IN_A_FILE
        self._facts: Mapping[str, str] = {}
        self._sampling: Mapping[str, str | int] = {}
        self._bar = progress_bar(
            total=total,
            initial=done,
            desc=title,
            unit="problem",
            disable=not shown,
            mininterval=self._interval,
        )

    def __enter__(self) -> EvaluationBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._bar.close()

    def sampling(self) -> Progress:
        """Return what shows how one call of an engine goes: tokens a second, and rows alive."""
        started = last = time.perf_counter()
        sampled = 0

        def told(tokens: int, rows_alive: int) -> None:
            nonlocal sampled, last
            sampled += tokens
            now = time.perf_counter()
            rate = sampled / max(now - started, 1e-9)
            self._sampling = {"tokens/s": f"{rate:,.0f}", "rows": rows_alive}
            if now - last >= self._interval:
                last = now
                self._bar.set_postfix({**self._facts, **self._sampling})

        return told

    def add(self, problems: int, facts: Mapping[str, str]) -> None:
        """Let the bar grow by so many problems, with what is known after them."""
        self._facts = facts
        self._bar.set_postfix({**facts, **self._sampling}, refresh=False)
        self._bar.update(problems)
