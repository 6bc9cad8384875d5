"""linear_logprob with the vocabulary split over processes, against one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from latro_kernels import linear_logprob
from tests.latro_kernels.logprob_cases import problem, solve, truth, unfused

SHAPE = (30, 130, 403)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {"bias": True, "temperature": 0.7, "softcap": 8.0, "entropy": True},
    "frozen": {"frozen": True, "bias": True, "softcap": 8.0},
    "filter": {"grad_filter": 1e-9, "memory_budget": 10_000},
    "bf16": {"dtype": torch.bfloat16, "entropy": True},
    "frozen, empty slices": {"frozen": True, "bias": True, "empty": True},
}
_OPTIONS = ("grad_filter", "memory_budget", "frozen", "empty")
NAMES = ("logp", "entropy", "dx", "dw", "db")


def of_case(case: str) -> tuple[Any, dict[str, Any]]:
    settings = CASES[case]
    given = problem(SHAPE, **{k: v for k, v in settings.items() if k not in _OPTIONS})
    options = {k: v for k, v in settings.items() if k in _OPTIONS}
    if options.pop("empty", False):
        # The first rank of two, or the first two of four, have nothing but -inf.
        given.bias[:202] = -torch.inf
        given = replace(given, target=202 + given.target % 201)
    return given, options


def borders(world: int) -> list[int]:
    """Slices of different sizes, the first of one column."""
    return [0, 1, *(SHAPE[2] * r // world + 1 for r in range(2, world)), SHAPE[2]]


def run_rank(rank: int, world: int, folder: str) -> None:
    """Every case on this rank's slice; the results go to a file of its own."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    columns = slice(*borders(world)[rank : rank + 2])
    results = {}
    for case in CASES:
        given, options = of_case(case)
        frozen = options.pop("frozen", False)
        hidden = given.hidden.requires_grad_()
        weight = given.weight[columns].clone().requires_grad_(not frozen)
        bias = None if given.bias is None else given.bias[columns].clone()
        if bias is not None:
            bias.requires_grad_(not frozen)
        entropy = given.grad_entropy is not None
        out = linear_logprob(
            *(hidden, weight, given.target),
            bias=bias,
            temperature=given.temperature,
            softcap=given.softcap,
            return_entropy=entropy,
            group=dist.group.WORLD,
            **options,
        )
        outputs = out if entropy else (out,)
        upstream = (given.grad_logp, given.grad_entropy)[: len(outputs)]
        torch.autograd.backward(outputs, upstream)
        values = (
            outputs[0].detach(),
            outputs[1].detach() if entropy else None,
            *(None if t is None else t.grad for t in (hidden, weight, bias)),
        )
        results[case] = dict(zip(NAMES, values, strict=True))
    with pytest.raises(ValueError, match=r"0\.\.402, got 403 in row 0"):
        linear_logprob(hidden, weight, torch.full((30,), 403), group=dist.group.WORLD)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_rank, (request.param, str(folder)), nprocs=request.param)
    return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(request.param)]


@pytest.mark.parametrize("case", CASES)
def test_ranks_together_match_fp64(case: str, ranks: list[Any], gate: Any) -> None:
    given, _ = of_case(case)
    exact, plain = truth(given), solve(unfused, given)
    for name in NAMES:
        parts: list[Tensor | None] = [results[case][name] for results in ranks]
        if parts[0] is None:
            continue
        if name in ("dw", "db"):
            gate(name, torch.cat(parts), exact[name], plain[name])
            continue
        for part in parts:
            assert torch.equal(part, parts[0]), f"{name}: ranks differ"
        gate(name, parts[0], exact[name], plain[name])


def test_the_reference_takes_the_whole_weight() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        given = problem((3, 4, 5))
        with pytest.raises(ValueError, match="group: expected None with backend 'reference'"):
            linear_logprob(
                given.hidden,
                given.weight,
                given.target,
                backend="reference",
                group=dist.group.WORLD,
            )
    finally:
        dist.destroy_process_group()
