from __future__ import annotations

import importlib.util

import pytest
import torch

from benchmarks.common import providers
from benchmarks.common.problem import errors, make_problem, solve_fp64

CPU = torch.device("cpu")
# One provider per peer, and the module that it needs.
PEERS = {"trl": "trl", "liger": "liger_kernel", "cce-compile": "cut_cross_entropy"}


@pytest.mark.parametrize(("name", "module"), PEERS.items())
def test_absent_peer_is_named_with_the_way_to_install_it(name, module, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda wanted: None if wanted == module else find_spec(wanted)
    )
    found, reasons = providers.discover([name, "unfused"], CPU, torch.float32)
    assert list(found) == ["unfused"]
    assert reasons == {name: "not installed (pip install -e '.[bench]')"}


@pytest.mark.parametrize("name", ["latro-triton", "latro-cuda"])
def test_gpu_backend_on_cpu(name):
    found, reasons = providers.discover([name], CPU, torch.float32)
    assert not found
    assert "needs a CUDA GPU" in reasons[name]


def test_budgets_are_those_of_the_names():
    budgets = {"latro-cpu": None, "latro-cpu-64mib": 1 << 26, "latro-cpu-recompute": 0}
    for name, budget in budgets.items():
        logprob = providers.PROVIDERS[name](CPU)
        assert logprob.keywords.get("memory_budget") == budget
    kept = providers.PROVIDERS["latro-cpu-keep"](CPU).keywords["memory_budget"]
    assert kept > 4 * 2**31
    assert "latro-reference-keep" not in providers.PROVIDERS


def test_provider_that_breaks_is_named_with_its_error(monkeypatch):
    def broken(hidden, weight, target):
        raise NotImplementedError("no kernel for this\nand a long story")

    monkeypatch.setitem(providers.PROVIDERS, "broken", lambda device: broken)
    found, reasons = providers.discover(["broken"], CPU, torch.float32)
    assert not found
    assert reasons == {"broken": "NotImplementedError: no kernel for this"}


def test_unknown_name():
    with pytest.raises(ValueError, match="expected some of"):
        providers.discover(["nobody"], CPU, torch.float32)


def test_every_provider_that_runs_here_is_right():
    names = [name for name in providers.PROVIDERS if name not in providers.SLOW_START]
    found, _ = providers.discover(names, CPU, torch.float32)
    problem = make_problem(providers.TINY, torch.float32, CPU)
    truth = solve_fp64(problem)
    unfused = errors(providers.solve(found["unfused"], problem), truth)
    for name, logprob in found.items():
        got = errors(providers.solve(logprob, problem), truth)
        for part in ("logp", "dx", "dw"):
            assert got[part] <= 2 * unfused[part] + 1e-5, (name, part)
