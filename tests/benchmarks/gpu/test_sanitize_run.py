from __future__ import annotations

import json
from dataclasses import replace
from unittest import mock

import pytest

from benchmarks.gpu import sanitize_run
from latro_kernels import native
from tests.latro_kernels.ops.table import GATHER_LOGPROB, LINEAR_KL, OPS

pytestmark = pytest.mark.long


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
    monkeypatch.setattr(sanitize_run, "OPS", [op for op in OPS if op is not LINEAR_KL])
    assert sanitize_run.main(["--backend", "cpu", "--out", str(tmp_path)]) == 1
    assert "latro_cpu_linear_kl_forward: never called" in capsys.readouterr().err


def checked(change) -> list[str]:
    """Say what is wrong with gather_logprob where `change` is made to its log-probs."""

    def function(**arguments):
        return change(GATHER_LOGPROB.function(**arguments), arguments["logits"])

    op = replace(GATHER_LOGPROB, function=function)
    given = GATHER_LOGPROB.of_rows(5)
    return sanitize_run.check(replace(given, op=op), "cpu")


def test_a_wrong_result_is_a_failure():
    assert checked(lambda logp, _: logp) == []
    (why,) = checked(lambda logp, _: logp + 1e-3)
    assert why.startswith("logp: error 0.001")
    assert checked(lambda logp, _: logp * float("nan"))[0] == "logp: not finite"


def test_a_wrong_gradient_is_a_failure():
    (why,) = checked(lambda logp, logits: logp + (logits - logits.detach()).sum(1))
    assert why.startswith("dlogits: error ")


def test_other_bits_the_second_time_are_a_failure():
    runs = mock.Mock(side_effect=[1.0, 1.0 + 2**-22])
    (why,) = checked(lambda logp, _: logp.detach() * runs() + (logp - logp.detach()))
    assert why.startswith("logp: ")
