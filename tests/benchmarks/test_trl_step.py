from __future__ import annotations

import json

import pytest

pytest.importorskip("trl", reason="needs trl, of pip install '.[test]'")

from benchmarks import trl_step
from benchmarks.updates.problem import QUICK
from latro_kernels.integrations.trl import LinearLogprob
from scripts.training_tables import trl_step as table

# TRL uses the old name of a setting that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")


def test_a_quick_run_does_both_steps_both_ways(tmp_path, monkeypatch, capsys):
    rows = []
    own_apply = LinearLogprob.apply

    def counted(hidden, *rest):
        rows.append(hidden.shape[0])
        return own_apply(hidden, *rest)

    monkeypatch.setattr(LinearLogprob, "apply", counted)
    # In this process, as what is measured is not looked at.
    monkeypatch.setattr(
        trl_step.memory, "measured", lambda measure, problem, *_, **__: measure(problem)
    )
    trl_step.main(
        ["--quick", "--device", "cpu", "--reps", "1", "--dtypes", "fp32", "--out", str(tmp_path)]
    )
    result = json.loads((tmp_path / "step.json").read_text())
    assert [row["trainer"] for row in result["rows"]] == ["RLOO", "SFT"]
    assert all(row["gradient_error"] < 1e-4 for row in result["rows"])
    assert all(row["peak"].keys() == {"trl", "patched"} for row in result["rows"])

    # A step is done for the gradient, the time and the memory. RLOO scores with policy and
    # reference and once more with gradient; SFT takes all tokens that have one before them.
    completions = QUICK.G * sum(QUICK.lengths)
    texts = QUICK.G * sum(QUICK.P + length - 1 for length in QUICK.lengths)
    assert rows == 9 * [completions] + 3 * [texts]
    assert "a step" in capsys.readouterr().out
    lines = table(result).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:4]] == [
        "RLOO, V = 199, float32",
        "SFT, V = 199, float32",
    ]
