from __future__ import annotations

import csv
import json

import pytest
import torch

from benchmarks import logprob_bench
from benchmarks.common.problem import CPU_SHAPES
from benchmarks.linear_logprob import BARE_GEMMS, ERRORS

TINY_RUN = ["--device", "cpu", "--n", "33", "--hidden", "48", "--vocab", "301", "--reps", "3"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    logprob_bench.main([*TINY_RUN, "--providers", "unfused,latro-cuda", "--out", str(out)])
    return out


def test_csv_has_a_row_a_provider_and_dtype(out):
    rows = list(csv.DictReader((out / "logprob.csv").open()))
    assert [(row["dtype"], row["provider"]) for row in rows] == [
        (dtype, provider) for dtype in ("fp32", "bf16") for provider in (BARE_GEMMS, "unfused")
    ]
    for row in rows:
        assert (row["N"], row["H"], row["V"], row["reps"]) == ("33", "48", "301", "3")
        for phase in ("forward", "backward", "full"):
            low, median, high = (float(row[f"{phase}_ms{end}"]) for end in ("_min", "", "_max"))
            assert 0 < low <= median <= high
    bare, unfused = rows[:2]
    assert float(bare["full_x_gemm"]) == 1.0
    assert bare["dw_error"] == bare["full_peak_extra_mib"] == ""
    assert float(unfused["full_x_gemm"]) == pytest.approx(
        float(unfused["full_ms"]) / float(bare["full_ms"]), rel=0.02
    )
    assert 0 <= float(unfused["dw_error"]) < 1e-5
    assert float(rows[3]["dw_error"]) < 0.05


def test_json_says_where_it_ran_and_who_could_not(out):
    result = json.loads((out / "logprob.json").read_text())
    assert result["environment"]["torch"] == torch.__version__
    assert result["environment"]["threads"] == torch.get_num_threads()
    assert result["cannot_run"] == ["latro-cuda (fp32, bf16): backend 'cuda' needs a CUDA GPU"]
    assert result["rows"][1]["error"].keys() == set(ERRORS)


def test_png_is_an_image_and_nothing_else_is_left(out):
    assert (out / "logprob.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == [
        "logprob.csv",
        "logprob.json",
        "logprob.png",
    ]


def test_table_names_providers_and_absences(tmp_path, capsys):
    logprob_bench.main(
        [*TINY_RUN, "--dtype", "fp32", "--providers", "unfused,latro-cuda", "--out", str(tmp_path)]
    )
    printed = capsys.readouterr().out
    assert "cannot run: latro-cuda (fp32): backend 'cuda' needs a CUDA GPU" in printed
    table = printed[printed.index("custom fp32: N=33 H=48 V=301") :]
    assert "unfused" in table
    assert "cannot run" not in table


def test_providers_that_are_absent_for_one_reason_share_a_line():
    cannot_run = {("a", "why"): ["fp32", "bf16"], ("b", "why"): ["fp32", "bf16"]}
    cannot_run[("c", "why")] = ["bf16"]
    assert logprob_bench.absences(cannot_run) == ["a, b (fp32, bf16): why", "c (bf16): why"]


def test_default_shapes_follow_the_device():
    assert logprob_bench.parse_args(["--device", "cpu"]).shapes == list(CPU_SHAPES)
    names = [shape.name for shape in logprob_bench.parse_args(["--device", "cuda"]).shapes]
    assert names == ["llama-3.1-8b", "mistral-7b", "phi-3.5-mini", "qwen2.5-7b"]
    assert [s.name for s in logprob_bench.parse_args(["--quick", "--device", "cpu"]).shapes] == [
        "quick"
    ]


@pytest.mark.parametrize(
    "argv",
    [
        ["--shapes", "gpt5"],
        ["--dtype", "int8"],
        ["--providers", "nobody"],
        ["--study", "head", "--sections", "tail"],
        ["--n", "4"],
        ["--n", "4", "--hidden", "4", "--vocab", "4", "--shapes", "quick"],
    ],
)
def test_bad_arguments_say_what_was_expected(argv, capsys):
    with pytest.raises(SystemExit):
        logprob_bench.parse_args(argv)
    assert "expected" in capsys.readouterr().err
