"""What tests of all studies need."""

from __future__ import annotations

import itertools

import pytest

# Of all tests, since all of them print into one folder.
_NUMBER = itertools.count()


@pytest.fixture
def forked(warm, tmp_path_factory, monkeypatch):
    """Start cells' commands as forks; `test_cells.py` tests real starts."""

    def start(command, *, cwd, env, stdout, **options):
        (_, _, module, *arguments) = command
        if module in ("latro.train", "latro.sft"):
            # One update takes a batch; to read ten thousand problems would take longer than it.
            arguments += ["--num_train_examples", "64"]
        printed = tmp_path_factory.getbasetemp() / f"cell {next(_NUMBER)}"
        return warm.start(module, arguments, printed, cwd=cwd, stdout=stdout.name, environment=env)

    monkeypatch.setattr("studies.cells.Popen", start)
