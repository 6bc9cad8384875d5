"""A plugin of pytest that runs TRL's own tests with `patch_trl()` on.

    git clone https://github.com/huggingface/trl && cd trl
    git checkout v$(python -c 'import trl; print(trl.__version__)')
    PYTHONPATH=<this repository> pytest -p scripts.patched_trl tests/test_sft_trainer.py

In a module of tests that imports TRL's function itself, ours stands in its place. How often each
did the work is printed at the end: a run in which ours was never called says nothing.
"""

from __future__ import annotations

from typing import Any

import pytest
from trl.kernels import chunked_logprob

from latro_kernels.integrations import trl as integration

_calls = {"LinearLogprob": 0, "ChunkedLogProbFunction": 0}


def _count(function: Any) -> None:
    apply = function.apply

    def counted(*arguments: Any, **named: Any) -> Any:
        _calls[function.__name__] += 1
        return apply(*arguments, **named)

    function.apply = counted


def pytest_configure() -> None:
    """Patch TRL before its tests are imported."""
    _count(integration.LinearLogprob)
    _count(chunked_logprob.ChunkedLogProbFunction)
    integration.patch_trl()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Replace TRL's function where a module of tests has imported it."""
    modules = [item.getparent(pytest.Module) for item in items]
    for module in {module for module in modules if module is not None}:
        for name, value in vars(module.obj).items():
            if value is chunked_logprob.ChunkedLogProbFunction:
                setattr(module.obj, name, integration.LinearLogprob)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how often ours was called, and how often it left the work to TRL's."""
    ours, theirs = _calls.values()
    terminalreporter.write_line(f"patch_trl: {ours} calls, of which {theirs} went on to TRL's own")
