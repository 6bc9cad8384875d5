"""What every test of the repository gets."""

from __future__ import annotations

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores; threads of several pools would wait for each other. Before torch is
    # imported, since OpenMP reads it once, and for the processes that tests start.
    os.environ["OMP_NUM_THREADS"] = "1"

import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
