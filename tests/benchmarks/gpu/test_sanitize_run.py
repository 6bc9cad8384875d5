from __future__ import annotations

import json
from dataclasses import replace
from unittest import mock

import pytest
import torch

from benchmarks.gpu import sanitize_run
from benchmarks.gpu.sanitize_run import Case
from latro_kernels import native

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(sanitize_run, "_TWO_TILES", (9, 40, 1283))


def test_everything_is_right_on_the_cpu(small, tmp_path):
    assert sanitize_run.main(["--backend", "cpu", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "sanitize.json").read_text())
    assert result["failures"] == []
    assert result["cases"] > 60
    assert set(result["launchers"]) == sanitize_run.launchers("cpu")


def test_launchers_are_what_the_header_has():
    names = {name for name in native.signatures() if name.startswith("latro_cuda_")}
    assert names - sanitize_run.launchers("cuda") == {"latro_cuda_error_string"}


def test_a_launcher_that_is_never_called_is_a_failure(small, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sanitize_run, "kl_cases", list)
    assert sanitize_run.main(["--backend", "cpu", "--out", str(tmp_path)]) == 1
    assert "latro_cpu_linear_kl_forward: never called" in capsys.readouterr().err


def test_a_wrong_result_is_a_failure():
    right = (torch.sin, torch.sin, torch.sin)
    assert case(*right).check("cpu", CPU) == []
    off = case(lambda x: torch.sin(x) + 1e-3, *right[1:])
    (why,) = off.check("cpu", CPU)
    assert why.startswith("result 0: error 1.00e-03")
    nothing = case(lambda x: torch.full_like(x, torch.nan), *right[1:])
    assert "error nan" in nothing.check("cpu", CPU)[0]


def test_other_bits_the_second_time_are_a_failure():
    runs = mock.Mock(side_effect=[1.0, 1.0 + 2**-23])
    (why,) = case(lambda x: torch.sin(x) * runs(), torch.sin, torch.sin).check("cpu", CPU)
    assert why == "result 0: other bits the second time"


def case(ours, exact, plain) -> Case:
    def op(x, *, backend):
        return {"cpu": ours, "reference": exact}[backend](x)

    return Case("case", op=op, plain=plain, inputs=(torch.linspace(0.5, 1, 9),), wanted=0)


def test_a_wrong_gradient_is_a_failure():
    wrong = case(lambda x: torch.sin(x) + (x - x.detach()) * 1e-2, torch.sin, torch.sin)
    (why,) = replace(wrong, wanted=1).check("cpu", CPU)
    assert why.startswith("result 1: error")
