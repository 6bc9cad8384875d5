"""A plugin of pytest that cuts the chosen tests in two: 40 of them, evenly spaced, and the rest.

    pytest -p benchmarks.gpu.sample --part smoke -m gpu tests/latro_kernels

So the 40, of all ops and forms, have run before the time for the others is over.
"""

from __future__ import annotations

import pytest

SMOKE = 40


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", choices=["smoke", "rest"], required=True)


@pytest.hookimpl(trylast=True)  # after `-m` has chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    count = len(items)
    smoke = {index * count // SMOKE for index in range(SMOKE)} if count > SMOKE else {*range(count)}
    parts: dict[bool, list[pytest.Item]] = {True: [], False: []}
    for index, item in enumerate(items):
        parts[index in smoke].append(item)
    chosen = config.getoption("part") == "smoke"
    config.hook.pytest_deselected(items=parts[not chosen])
    items[:] = parts[chosen]
