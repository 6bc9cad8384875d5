from __future__ import annotations

import csv
import json

import pytest
import torch

from benchmarks import head_study, logprob_bench
from benchmarks.common import memory, small_lm
from benchmarks.common.problem import CPU_SHAPES, STUDY_SHAPES, Problem, Shape
from benchmarks.common.providers import PROVIDERS
from benchmarks.common.small_lm import TrainedHead
from benchmarks.common.timing import Summary
from benchmarks.head_study import Comparison
from benchmarks.head_study_report import Group, Results, checks, slopes
from benchmarks.linear_logprob import BARE_GEMMS, Limits, Row

pytestmark = pytest.mark.long
CPU = torch.device("cpu")
SHAPE = Shape("test", n=8, h=16, v=32)
TINY_RUN = ["--study", "head", "--quick", "--device", "cpu", "--dtype", "fp32"]
TINY_RUN += ["--n", "33", "--hidden", "48", "--vocab", "301"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        peers = Comparison(("forward", "full"), others=("unfused", "liger-flce"))
        patch.setitem(head_study.COMPARISONS, "peers", peers)
        logprob_bench.main([*TINY_RUN, "--data", str(out / "absent"), "--out", str(out)])
    return out


def one_time(seconds: float) -> Summary:
    return Summary(median=seconds, low=seconds, high=seconds, reps=1)


def row(provider: str, *, multiple: float = 1.0, memory: int = 0, logp: float = 0.0) -> Row:
    return Row(
        shape=SHAPE,
        dtype="fp32",
        provider=provider,
        times={"full": one_time(multiple)},
        multiples={"full": multiple},
        memory={"full": memory},
        error={"logp": logp, "dx": 0.0, "dw": 0.0, "dx_peaked": None},
        error_rows=8,
    )


def group(section: str, rows: list[Row], dtype: str = "fp32", name: str = "test") -> Group:
    where = {"device": "none"}
    return Group(section, name, dtype=dtype, rows=rows, notes=[], environment=where)


def test_every_section_has_its_rows(ran):
    rows = list(csv.DictReader((ran / "study_head.csv").open()))
    sections = {section: [r for r in rows if r["section"] == section] for section in rows_of(rows)}
    # There is no text to train a small model on.
    assert list(sections) == ["forward", "full", "frozen", "peers", "error", "scaling"]
    providers = {name: [r["provider"] for r in of] for name, of in sections.items()}
    budgets = ["latro-cpu-keep", "latro-cpu-64mib", "latro-cpu-recompute"]
    assert providers["forward"] == providers["frozen"] == [BARE_GEMMS, "latro-cpu"]
    assert providers["full"] == [BARE_GEMMS, *budgets]
    assert providers["peers"] == [BARE_GEMMS, "latro-cpu", "unfused"]
    assert providers["error"] == ["latro-cpu", "unfused"]
    assert len(sections["scaling"]) == 2 * 3 * 3

    assert sections["forward"][1]["full_ms"] == sections["full"][1]["forward_ms"] == ""
    assert sections["frozen"][1]["dw_error"] == ""
    for bare in (sections[name][0] for name in ("full", "frozen", "peers")):
        assert float(bare["full_x_gemm"]) == 1.0
    for name in ("full", "frozen", "peers"):
        for measured in sections[name][1:]:
            assert float(measured["full_ms"]) > 0
            assert 0 <= float(measured["dx_error"]) < 1e-5
            if memory.can_measure(CPU) is None:
                assert float(measured["full_peak_extra_mib"]) >= 0
    assert [r["full_ms"] for r in sections["error"]] == ["", ""]


def rows_of(rows: list[dict[str, str]]) -> list[str]:
    return list(dict.fromkeys(r["section"] for r in rows))


def test_json_says_where_each_table_was_made_and_who_was_absent(ran):
    result = json.loads((ran / "study_head.json").read_text())
    by_section = {of["section"]: of for of in result["groups"]}
    for of in by_section.values():
        assert of["environment"]["torch"] == torch.__version__
    (absent,) = by_section["peers"]["notes"]
    assert absent.startswith("cannot run: liger-flce: ")
    assert {check["where"] for check in result["checks"]} == {
        "forward custom fp32",
        "full custom fp32",
        "frozen custom fp32",
        "peers custom fp32",
    }
    assert result["slopes"].keys() == {"N to 256 fp32", "V to 4096 fp32"}


def test_nothing_but_whole_files_is_left(ran):
    names = ["study_head.csv", "study_head.json", "study_head.png", "study_head_scaling.png"]
    assert sorted(path.name for path in ran.iterdir()) == names
    for name in names[2:]:
        assert (ran / name).read_bytes().startswith(b"\x89PNG")


def test_a_section_measured_again_replaces_itself_and_keeps_the_rest(ran, capsys):
    before = {of.key: of for of in Results(ran).groups}
    logprob_bench.main([*TINY_RUN, "--sections", "error,filter", "--out", str(ran), "--data", "x"])
    captured = capsys.readouterr()
    after = {of.key: of for of in Results(ran).groups}
    assert after.keys() == before.keys()
    for key, of in after.items():
        assert (of.environment == before[key].environment) or key[0] == "error"
        assert of.rows == before[key].rows or key[0] == "error"
    assert "filter: skipped, no text to train a small model on" in captured.err
    assert "frozen, custom fp32: N=33 H=48 V=301" in captured.out
    assert "slope" in captured.out
    assert "Aims" in captured.out


def test_filter_is_measured_on_the_trained_head(tmp_path, monkeypatch):
    def trained(data, settings, rows, cache, device):
        generator = torch.Generator().manual_seed(0)
        hidden, weight = (torch.randn(n, 16, generator=generator) for n in (rows, 200))
        return TrainedHead(hidden, weight, torch.arange(rows) % 200, perplexity=12.3)

    monkeypatch.setattr(small_lm, "trained", trained)
    logprob_bench.main([*TINY_RUN, "--sections", "filter", "--out", str(tmp_path)])
    (of,) = Results(tmp_path).groups
    assert "perplexity 12.3" in of.notes[0]
    assert of.rows[0].shape.v == 200
    names = [BARE_GEMMS, "latro-cpu-keep"]
    names += [f"latro-cpu-keep, eps 2^{exponent}" for exponent in head_study.EXPONENTS]
    assert [row.provider for row in of.rows] == names
    assert all(row.more.keys() >= {"skipped %", "dX bound", "dW error"} for row in of.rows[1:])
    (check,) = checks([of])
    assert check.what == "latro-cpu-keep, eps 2^-12"


def test_file_of_something_else(tmp_path):
    (tmp_path / "study_head.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match="expected the results of a head study"):
        Results(tmp_path)


def test_slope_is_the_power_of_the_size():
    def timed(provider: str, n: int, seconds: float) -> Row:
        return Row(Shape("", n=n, h=16, v=32), "fp32", provider, times={"full": one_time(seconds)})

    sizes = (8, 16, 32, 64)
    rows = [timed("linear", n, 3e-3 * n) for n in sizes]
    rows += [timed("square", n, 5e-6 * n**2) for n in sizes]
    got = slopes(group("scaling", rows, name="N to 64"))
    assert got == pytest.approx({"linear": 1.0, "square": 2.0})


def test_checks_of_multiples_follow_the_dtype():
    rows = [row(BARE_GEMMS), row("latro-cpu-keep", multiple=1.2), row("latro-cpu-recompute")]
    for dtype, met in (("fp32", False), ("bf16", True)):
        (check,) = checks([group("full", rows, dtype)])
        assert (check.what, check.measured, check.met) == ("latro-cpu-keep", 1.2, met)


def test_checks_of_errors_are_of_bf16():
    rows = [row("latro-cpu", logp=2e-4), row("unfused", logp=8e-4)]
    assert checks([group("error", rows, "fp32")]) == []
    (check,) = checks([group("error", rows, "bf16")])
    assert check.measured == pytest.approx(0.25)
    assert check.met


def test_checks_against_peers():
    rows = [
        row(BARE_GEMMS),
        row("latro-cpu-keep", multiple=1.0, memory=700),
        row("latro-cpu-64mib", multiple=1.25, memory=500),
        row("latro-cpu-recompute", multiple=1.5, memory=50),
        row("unfused", multiple=1.25, memory=1000),
        row("trl", multiple=1.0),
    ]
    got = {check.what: (check.measured, check.met) for check in checks([group("peers", rows)])}
    assert got == {
        "latro-cpu-keep / unfused, full": (0.8, True),
        "latro-cpu-recompute / unfused, memory": (0.05, True),
        "latro-cpu-recompute / unfused, full": (1.2, False),
        "latro-cpu-64mib / unfused, full": (1.0, True),
        "latro-cpu-64mib / trl, full": (1.25, False),
    }


def test_default_shapes():
    assert logprob_bench.parse_args(["--study", "head", "--device", "cpu"]).shapes is None
    assert head_study.default_shapes("full", CPU) == STUDY_SHAPES
    assert head_study.default_shapes("peers", CPU) == CPU_SHAPES


def problem_of(logits: torch.Tensor, target: list[int], grad: list[float]) -> Problem:
    """Return the head whose logits are given: the hidden states are the unit vectors."""
    return Problem(
        hidden=torch.eye(len(logits)).requires_grad_(),
        weight=logits.T.contiguous().requires_grad_(),
        target=torch.tensor(target),
        grad=torch.tensor(grad),
    )


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_evidence_of_a_case_made_by_hand(chunk_bytes, monkeypatch):
    monkeypatch.setattr(head_study, "_CHUNK_BYTES", chunk_bytes)
    p = torch.tensor(
        [
            [0.50, 0.25, 0.125, 0.0625, 0.0625],
            [0.25, 0.25, 0.25, 0.125, 0.125],
            [0.0625, 0.0625, 0.125, 0.25, 0.50],
        ]
    )
    problem = problem_of(p.log(), target=[0, 1, 4], grad=[1.0, -2.0, 0.5])
    bound, hit = head_study.evidence(problem, columns=2)
    # Three blocks of columns, of which the last has one column.
    torch.testing.assert_close(
        bound, torch.tensor([[0.5, 0.125, 0.0625], [0.5, 0.5, 0.25], [0.03125, 0.125, 0.25]])
    )
    assert hit.tolist() == [[True, False, False], [True, False, False], [False, False, True]]


def test_skipped_puts_rows_together_that_need_as_much():
    bound = torch.tensor([[0.9, 0.9, 0.9], [0.9, 0.0, 0.0], [0.9, 0.9, 0.9], [0.9, 0.0, 0.0]])
    hit = torch.zeros(4, 3, dtype=torch.bool)
    # Rows 1 and 3 form a block of rows, and two of its three blocks of columns are skipped.
    assert head_study.skipped(bound, hit, rows=2, eps=0.5) == pytest.approx(2 / 6)
    hit[1, 2] = True
    assert head_study.skipped(bound, hit, rows=2, eps=0.5) == pytest.approx(1 / 6)


def test_bounds_are_sums_of_magnitudes():
    problem = Problem(
        hidden=torch.tensor([[1.0, -3.0], [2.0, 1.0]]),
        weight=torch.tensor([[1.0, 0.5], [-1.0, 0.5], [4.0, -8.0]]),
        target=torch.tensor([0, 1]),
        grad=torch.ones(2),
    )
    assert head_study.bounds(problem, 0.5) == (0.5 * 9, 0.5 * 4)


def test_filter_skips_what_is_improbable_within_the_bound():
    generator = torch.Generator().manual_seed(0)
    hidden = 0.25 * torch.randn(48, 16, generator=generator)
    # Of 960 tokens the first 96 are probable, and the targets are among them.
    weight = torch.randn(960, 16, generator=generator)
    weight[:96] *= 4
    target = torch.randint(96, (48,), generator=generator)
    grad = torch.randn(48, generator=generator)
    problem = Problem(hidden.requires_grad_(), weight.requires_grad_(), target=target, grad=grad)

    limits = Limits(reps=1, seconds=1.0, truth_flop=1e9)
    found = {"latro-cpu": PROVIDERS["latro-cpu"](CPU)}
    rows, reasons = head_study.measure_filter(problem, "test", "fp32", found=found, limits=limits)
    assert not reasons
    assert rows[0].provider == BARE_GEMMS
    exact, *filtered = rows[1:]
    assert exact.more["skipped %"] == 0
    shares = [row.more["skipped %"] for row in filtered]
    assert shares == sorted(shares)
    assert 0 < shares[-1] < 100
    for row in filtered:
        for gradient in ("dX", "dW"):
            error = row.more[f"{gradient} error"]
            assert error <= row.more[f"{gradient} bound"] + 2 * exact.more[f"{gradient} error"]
    assert filtered[-1].more["dX error"] > 10 * exact.more["dX error"]
