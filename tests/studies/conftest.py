"""What tests of all studies need."""

from __future__ import annotations

import itertools

import pytest


@pytest.fixture
def forked(warm, tmp_path_factory, monkeypatch):
    """Start cells' commands as forks; `test_cells.py` tests real starts."""
    number = itertools.count()

    def start(command, *, cwd, env, stdout, **options):
        (_, _, module, *arguments) = command
        printed = tmp_path_factory.getbasetemp() / f"cell {next(number)}"
        return warm.start(module, arguments, printed, cwd=cwd, stdout=stdout.name, environment=env)

    monkeypatch.setattr("studies.cells.Popen", start)
