from __future__ import annotations

import json

import pytest
import torch

from benchmarks import linear_sample
from benchmarks.linear_sample import Case, Inputs, providers
from scripts.kernel_tables import sample

pytestmark = pytest.mark.long
CPU = torch.device("cpu")
CASE = Case(N=4, H=32, V=200, dtype="bf16")


@pytest.mark.parametrize("name", providers(CPU))
def test_providers_draw_by_the_same_distribution(name):
    """A token with p above 0.999 is everyone's."""
    given = Inputs(CASE, CPU)
    given.hidden = given.weight[[3, 199, 0, 3]] * 2
    assert providers(CPU)[name](given).tolist() == [3, 199, 0, 3]


def test_a_read_takes_all_of_the_weight():
    given = Inputs(CASE, CPU)
    given.weight = torch.zeros(200, 32, dtype=torch.bfloat16)
    given.weight[-1, -1] = 1
    assert linear_sample.read(given) > 0


def test_a_quick_run_writes_every_provider(tmp_path, capsys):
    options = ["--quick", "--device", "cpu", "--reps", "2", "--out", str(tmp_path)]
    linear_sample.main([*options, "--rows", "1,8", "--dtype", "fp32"])
    path = tmp_path / "linear_sample.json"
    first = json.loads(path.read_text())["rows"]
    names = ["read", *providers(CPU)]
    assert [row["provider"] for row in first] == names * 2
    # Memory is that of the most rows.
    assert [row["N"] for row in first if row["extra_bytes"] is not None] == [8] * (len(names) - 1)
    assert "linear_sample" in capsys.readouterr().out

    # Another measurement of some of them replaces these, and keeps the others.
    linear_sample.main([*options, "--rows", "8", "--dtype", "fp32,bf16"])
    result = json.loads(path.read_text())
    cases = [(row["dtype"], row["N"]) for row in result["rows"]]
    assert list(dict.fromkeys(cases)) == [("fp32", 1), ("fp32", 8), ("bf16", 8)]
    assert len(cases) == 3 * len(names)

    lines = sample(result).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:5]] == [
        "1000 × 128, fp32, N = 1",
        "1000 × 128, fp32, N = 8",
        "1000 × 128, bf16, N = 8",
    ]
    assert lines[2].endswith("| – / – |")
