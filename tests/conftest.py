"""Fixtures and settings for all tests of the repository."""

from __future__ import annotations

import gc
import logging
import os
import signal
from collections import Counter
from collections.abc import Iterator

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores; threads of several pools would wait for each other. Before torch is
    # imported, since OpenMP reads it once, and for the processes that tests start.
    os.environ["OMP_NUM_THREADS"] = "1"

import torch

from tests.warm_process import WarmProcess


def pytest_configure(config: pytest.Config) -> None:
    # pytest-xdist would hand out files by their number of tests, and so leave a long file with one
    # test to one worker while the others have nothing left to do.
    config.option.loadscopereorder = False


def pytest_collection_finish() -> None:
    # Trainers collect garbage at their end; keep them from searching what the imports made.
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        tests = Counter(item.path for item in items)
        items.sort(key=lambda i: (not i.get_closest_marker("long"), -tests[i.path], i.path))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture
def ordinary_signals() -> Iterator[None]:
    """Set signals to their defaults, since a background job ignores SIGINT, and nohup SIGHUP."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    given = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in given.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def warm() -> Iterator[WarmProcess]:
    """Yield what starts commands that have everything imported already."""
    with WarmProcess() as process:
        yield process


class Deprecations(logging.Handler):
    """Keeps log messages about deprecation."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecated" in message:
            self.messages.append(message)


@pytest.fixture(autouse=True)
def nothing_deprecated_is_logged() -> Iterator[None]:
    """Fail for logged deprecations, as the settings make warnings of deprecation errors."""
    deprecations = Deprecations()
    loggers = [logging.getLogger(name) for name in ("transformers", "accelerate", "peft", "trl")]
    for logger in loggers:
        logger.addHandler(deprecations)
    yield
    for logger in loggers:
        logger.removeHandler(deprecations)
    assert deprecations.messages == []
