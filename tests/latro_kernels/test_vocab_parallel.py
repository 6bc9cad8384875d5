"""linear_logprob and linear_sample with the vocabulary split over processes, against one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.latro_kernels.ops import linear_sample
from tests.latro_kernels.ops.linear_logprob import STATISTICS, problem
from tests.latro_kernels.ops.op import Problem, Results, gate
from tests.latro_kernels.test_row_statistics import of_mean

SHAPE = (30, 130, 403)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {"bias": True, "temperature": 0.7, "softcap": 8.0, "statistics": STATISTICS},
    "frozen": {"frozen": True, "bias": True, "softcap": 8.0, "statistics": ("log_sum_exp",)},
    "batched, some ignored": {"batch": True, "bias": True, "entropy": True},
    "batched, frozen": {"batch": True, "frozen": True},
    "filter": {"grad_filter": 1e-9, "memory_budget": 10_000, "statistics": ("log_sum_exp",)},
    "bf16": {"dtype": torch.bfloat16, "entropy": True},
    "frozen, of squares": {"frozen": True, "statistics": ("log_sum_p_squared",)},
    "empty slices": {"bias": True, "empty": True, "statistics": ("log_sum_p_squared",)},
    "frozen, empty slices": {
        **{"frozen": True, "bias": True, "empty": True, "statistics": ("log_sum_exp",)}
    },
}
SAMPLES: dict[str, dict[str, Any]] = {
    "sample": {},
    "sample, everything": {"bias": True, "temperature": 0.7, "softcap": 8.0},
    "sample, bf16": {"dtype": torch.bfloat16},
    "sample, arg max": {"temperature": 0, "bias": True},
    "sample, empty slices": {"bias": True, "empty": True},
}


MEANS = ("plain", "everything", "batched, some ignored", "empty slices")


def of_case(case: str) -> Problem:
    settings = dict((CASES | SAMPLES)[case])
    empty = settings.pop("empty", False)
    given = (linear_sample.problem if case in SAMPLES else problem)(SHAPE, **settings)
    if empty:
        # The first rank of two, or the first two of four, have nothing but -inf.
        given["bias"][:202] = -torch.inf
    if empty and case in CASES:
        given = given.but(target=202 + given["target"] % 201)
    return given


def borders(world: int) -> list[int]:
    """Slices of different sizes, the first of one column."""
    return [0, 1, *(SHAPE[2] * r // world + 1 for r in range(2, world)), SHAPE[2]]


def no_distribution() -> Problem:
    """Make a problem with a row of NaN, one of +∞, and a last slice of two or four of −∞ alone."""
    given = linear_sample.problem(SHAPE, bias=True)
    given["hidden"][3, 2] = torch.nan
    given["hidden"][5, 2] = torch.inf
    given["bias"][202:] = -torch.inf
    return given


def on_slices(given: Problem, columns: slice) -> Results:
    """Return a rank's results, its weight and bias being these columns."""
    names = [n for n in ("weight", "bias") if given[n] is not None]
    own = given.but(**{name: given[name][columns].clone() for name in names})
    return own.solve("auto", group=dist.group.WORLD)


def run_rank(rank: int, world: int, folder: str) -> None:
    """Every case on this rank's slice; the results go to a file of its own."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    columns = slice(*borders(world)[rank : rank + 2])
    results = {}
    for case in (*SAMPLES, *CASES):
        results[case] = on_slices(of_case(case), columns)
    for case in MEANS:
        results[f"mean, {case}"] = on_slices(of_mean(of_case(case)), columns)
    results["no distribution"] = on_slices(no_distribution(), columns)
    with pytest.raises(ValueError, match=r"0\.\.402, got 403 in row 0"):
        on_slices(of_case("plain").but(target=torch.full((30,), 403)), columns)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_rank, (request.param, str(folder)), nprocs=request.param)
    return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(request.param)]


@pytest.mark.parametrize("case", [*CASES, *SAMPLES])
def test_ranks_together_match_fp64(case: str, ranks: list[Any]) -> None:
    given = of_case(case)
    exact, plain = given.truth(), given.unfused()
    for name in exact:
        parts: list[Tensor] = [results[case][name] for results in ranks]
        if name in ("dw", "db"):
            gate(name, torch.cat(parts), exact[name], plain[name], given)
            continue
        for part in parts:
            assert torch.equal(part, parts[0]), f"{name}: ranks differ"
        gate(name, parts[0], exact[name], plain[name], given)


@pytest.mark.parametrize("case", MEANS)
def test_ranks_have_the_mean_logit_of_all_columns(case: str, ranks: list[Any]) -> None:
    given = of_mean(of_case(case))
    truth = given.truth()["mean_logit"]
    in_fp32 = given.results(given.op.reference, torch.float32)["mean_logit"]
    for results in ranks:
        found = results[f"mean, {case}"]["mean_logit"]
        if "empty" in case:
            assert (found == -torch.inf).all()
        else:
            gate("mean_logit", found, truth, in_fp32)


@pytest.mark.parametrize("case", SAMPLES)
def test_ranks_draw_the_tokens_of_one_process(case: str, ranks: list[Any]) -> None:
    alone = of_case(case).solve("auto")["token"]
    for results in ranks:
        assert torch.equal(results[case]["token"], alone)


def test_ranks_agree_on_rows_without_a_distribution(ranks: list[Any]) -> None:
    alone = no_distribution().solve("auto")
    for results in ranks:
        found = results["no distribution"]
        assert torch.equal(found["token"], alone["token"])
        assert found["logp"].isnan().nonzero().flatten().tolist() == [3, 5]
        assert found["token"][[3, 5]].tolist() == [0, 0]


@pytest.mark.parametrize("make", [problem, linear_sample.problem])
def test_the_reference_takes_the_whole_weight(make: Any) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        given = make((3, 4, 5))
        with pytest.raises(ValueError, match="group: expected None with backend 'reference'"):
            given.solve("reference", group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()
