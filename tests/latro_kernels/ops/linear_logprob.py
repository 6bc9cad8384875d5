"""linear_logprob for the tests of all ops."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear

from latro_kernels import linear_logprob
from latro_kernels.linear_logprob import reference
from tests.latro_kernels.ops import gather_logprob
from tests.latro_kernels.ops.op import COLUMNS, DTYPES, HIDDEN, INTERPRETED, Op, Problem, Results

FP32, BF16, FP16 = DTYPES
STATISTICS = gather_logprob.STATISTICS


def problem(
    shape: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    *,
    rows: str = "random",
    bias: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    statistics: tuple[str, ...] = (),
    frozen: bool = False,
    batch: bool = False,
    seed: int = 0,
    **options: Any,
) -> Problem:
    """Make a random problem of (N, H, V); of a frozen head hidden alone is trained.

    With `batch` hidden is [N, 3, H], and a third of the targets is ignored.

    `rows` is "random", "flat" (all logits nearly equal) or "peaked" (p of the target above 0.999,
    logits of the others random). With `entropy` the pair of log-probs and entropies is asked for.
    """
    N, H, V = shape
    leading = (N, 3) if batch else (N,)
    random = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random)

    hidden = normal(*leading, H) * (1e-3 if rows == "flat" else 1.0)
    weight = normal(V, H) * (2.0 / H**0.5)
    target = torch.randint(V, leading, generator=random)
    if rows == "peaked":
        # Targets of their own, and hidden states that point at them.
        target = torch.randperm(V, generator=random)[:N]
        directions = weight[target]
        norm = directions.square().sum(1, keepdim=True)
        hidden = 0.1 * hidden + directions * (17.0 * max(1.0, temperature) / norm)
    arguments = {
        "hidden": hidden.to(dtype),
        "weight": weight.to(dtype),
        "target": gather_logprob.ignoring_some(target) if batch else target,
        "bias": normal(V).to(dtype) if bias else None,
        "temperature": temperature,
        "softcap": softcap,
        "ignore_index": gather_logprob.IGNORED if batch else None,
    }
    names = ("logp", "entropy") if entropy else ("logp", *statistics)
    upstream = {name: normal(*leading) for name in names}
    return Problem(
        op=OP,
        arguments=arguments,
        upstream=upstream,
        trained=("hidden",) if frozen else ("hidden", "weight", "bias"),
        options={"return_entropy": entropy, "statistics": statistics or None} | options,
    )


def trained_like(
    dtype: torch.dtype,
    statistics: tuple[str, ...] = (),
    shape: tuple[int, int, int] = (150, 160, 3000),
) -> Problem:
    """Make rows that are sure of a few tokens among many, as a trained model's are."""
    given = problem(shape, dtype, statistics=statistics, bias=True)
    likely = shape[2] // 15
    bias = given["bias"].float()
    bias[likely:] -= 12.0
    return given.but(bias=bias.to(dtype), target=given["target"] % (2 * likely))


def of_a_part(given: Problem) -> Results:
    """Return what Triton's raw forward makes of each row, as over a part of the vocabulary."""
    row_max, sum_exp, target_logit, *_, dx_sum, _, _ = torch.ops.latro_kernels.linear_logprob(
        hidden=given["hidden"],
        weight=given["weight"],
        target=given["target"],
        kept=None,
        bias=given["bias"],
        temperature=given["temperature"],
        softcap=given["softcap"] or 0.0,
        backend="triton",
        is_whole=False,
        weighted_sum=False,
        dx_sum=True,
        block_max=False,
        memory_budget=0,
        further_sums=False,
    )
    return {
        "row_max": row_max,
        "sum_exp": sum_exp,
        "target_logit": target_logit,
        "dx_sum": dx_sum,
    }


def unfused(hidden: Tensor, weight: Tensor, bias: Tensor | None, **more: Any) -> tuple[Tensor, ...]:
    """Logits in the model's dtype, the loss in fp32."""
    return gather_logprob.unfused(linear(hidden, weight, bias), **more)


def formula(hidden: Tensor, weight: Tensor, bias: Tensor, **more: Any) -> Results:
    """Apply the formula of logits."""
    return gather_logprob.formula(hidden @ weight.T + bias, **more)


def strided(given: Problem) -> list[Problem]:
    """Rows and columns that lie apart, a transposed weight, one number as the whole bias."""
    hidden, weight, bias, target = (given[n] for n in ("hidden", "weight", "bias", "target"))
    turned = given.but(
        hidden=torch.stack([hidden, hidden], 1)[:, 1],
        weight=weight.t().contiguous().t(),
        target=torch.stack([target, target], 1)[:, 0],
        bias=bias.repeat_interleave(2)[::2],
    )
    assert not turned["weight"].is_contiguous()
    every_second = given.but(
        hidden=hidden.repeat_interleave(2, 1)[:, ::2],
        weight=weight.repeat_interleave(2, 1)[:, ::2],
        bias=bias[:1].expand(len(bias)),
    )
    return [turned, every_second]


def _samples() -> list[tuple[tuple[int, int, int], torch.dtype, dict[str, Any]]]:
    plain: list[dict[str, Any]] = [
        {},
        {"bias": True, "entropy": True},
        {"temperature": 0.7, "statistics": ("log_sum_exp",)},
        {"temperature": 0.7, "softcap": 5.0},
        {"temperature": 1.3, "softcap": 30.0, "bias": True, "statistics": STATISTICS},
    ]
    extremes = [
        {"rows": rows, "statistics": statistics}
        for rows in ("peaked", "flat")
        for statistics in ((), STATISTICS)
    ]
    if INTERPRETED:
        return [
            ((0, 3, 5), FP32, {"bias": True, "entropy": True}),
            ((1, 1, 1), FP32, {"bias": True, "entropy": True}),
            ((5, 3, 70), FP32, {"softcap": 5.0, "temperature": 0.7, "statistics": STATISTICS}),
            ((10, 7, 70), FP32, {}),
            ((10, 7, 70), FP32, {"statistics": ("log_sum_exp",)}),
            ((6, 70, 70), FP32, {"rows": "peaked", "statistics": STATISTICS}),
            ((6, 9, 70), FP32, {"rows": "flat", "entropy": True}),
            ((0, 3, 5), BF16, {"bias": True, "entropy": True}),
            ((1, 1, 1), BF16, {"bias": True, "entropy": True}),
            ((5, 3, 70), BF16, {"bias": True, "softcap": 30.0}),
            ((10, 17, 70), BF16, {"bias": True, "softcap": 5.0, "statistics": STATISTICS}),
            ((6, 70, 70), BF16, {"rows": "peaked", "statistics": STATISTICS}),
            ((6, 9, 70), BF16, {"rows": "flat", "entropy": True}),
            ((5, 3, 70), FP16, {"entropy": True, "temperature": 0.7}),
            ((4, 7, 70), FP32, {"batch": True, "bias": True, "entropy": True}),
            ((4, 7, 70), FP16, {"batch": True, "softcap": 5.0}),
            ((4, 7, 70), FP16, {"batch": True, "frozen": True}),
            ((4, 7, 70), FP16, {"batch": True, "frozen": True, "statistics": ("log_sum_exp",)}),
            ((10, 40, 70), FP16, {"bias": True, "temperature": 1.3}),
        ]
    # N, H, V: none; one of everything; odd; prime V; an H for which bf16 is multiplied as such.
    shapes = [(0, 5, 300), (1, 1, 1), (7, 3, 101), (1, 33, 64), (33, 17, 257), (40, 256, 1031)]
    batched: list[dict[str, Any]] = [
        *({"batch": True, **options} for options in plain[-2:]),
        {"batch": True, "frozen": True},
        {"batch": True, "frozen": True, "statistics": ("log_sum_exp",)},
    ]
    return [
        *product(shapes, DTYPES, plain),
        *product([(40, 256, 1031)], DTYPES, extremes),
        *product([(0, 5, 300), (33, 17, 257), (40, 130, 1031)], DTYPES, batched),
    ]


def _of_rows(N: int, dtype: torch.dtype = FP32, *, batch: bool = False, **form: Any) -> Problem:
    return problem(
        (gather_logprob.first_dimension(N, batch), HIDDEN, COLUMNS), dtype, batch=batch, **form
    )


GOOD = {
    "hidden": torch.zeros(4, 3),
    "weight": torch.zeros(5, 3),
    "target": torch.zeros(4, dtype=torch.int64),
}
BAD = [
    ({"hidden": [1.0]}, TypeError, "hidden: expected a tensor, got list"),
    ({"hidden": torch.tensor(1.0)}, ValueError, r"hidden: expected 1 dimension or more, got shape"),
    ({"hidden": torch.zeros(3)}, ValueError, r"target: expected shape \(\), as hidden has rows"),
    ({"hidden": torch.zeros(1, 4, 3)}, ValueError, r"target: expected shape \(1, 4\), as hidden"),
    ({"weight": torch.zeros(5)}, ValueError, "weight: expected 2 dimensions, got shape"),
    ({"weight": torch.zeros(5, 2)}, ValueError, r"weight: expected shape \[V, H\].*H = 3"),
    ({"weight": torch.zeros(0, 3)}, ValueError, "weight: .*V > 0"),
    ({"weight": torch.zeros(5, 3).half()}, TypeError, "weight: expected the dtype of hidden"),
    ({"weight": torch.zeros(5, 3, device="meta")}, ValueError, "weight: expected the device"),
    ({"hidden": torch.zeros(4, 3).int()}, TypeError, "hidden: expected dtype .*got torch.int32"),
    ({"hidden": torch.zeros(4, 3).double()}, TypeError, "hidden: expected dtype torch.float32"),
    ({"bias": torch.zeros(4)}, ValueError, r"bias: expected shape \(5,\).*got 4"),
    ({"bias": torch.zeros(5, 1)}, ValueError, "bias: expected 1 dimension, got"),
    ({"bias": torch.zeros(5).bfloat16()}, TypeError, "bias: expected the dtype of hidden"),
    ({"memory_budget": -1}, ValueError, "memory_budget: expected 0 or more, got -1"),
    ({"memory_budget": 1e6}, TypeError, "memory_budget: expected an int, got float"),
    ({"memory_budget": 2**63}, ValueError, "memory_budget: expected an int that int64 holds"),
    ({"grad_filter": -0.1}, ValueError, "grad_filter: expected a finite number, 0 or more"),
    ({"grad_filter": "no"}, TypeError, "grad_filter: expected a float, got str"),
    *(
        ({"grad_filter": value}, ValueError, "^grad_filter: expected ")
        for value in (1e39, float("nan"), 10**400, -0.5)
    ),
    (
        {"grad_filter": 0.1, "backend": "cuda"},
        ValueError,
        "grad_filter: expected 0 with backend 'cuda'",
    ),
    ({"group": 3}, TypeError, "group: expected a ProcessGroup, got int"),
]
OP = Op(
    name="linear_logprob",
    function=linear_logprob,
    reference=reference,
    unfused=unfused,
    formula=formula,
    outputs=("logp", *STATISTICS),
    gradients={"hidden": "dx", "weight": "dw", "bias": "db"},
    rows=("hidden", "target"),
    columns={"weight": 0, "bias": 0},
    of_rows=_of_rows,
    problem=problem,
    uneven=[(53, 2048, 1203), (1100, 130, 200)],
    samples=_samples(),
    draws=st.builds(
        problem,
        st.tuples(st.integers(0, 40), st.integers(1, 70), st.integers(1, 500)),
        bias=st.booleans(),
        statistics=st.sampled_from([(), *((name,) for name in STATISTICS), STATISTICS]),
        softcap=st.sampled_from([None, 2.0, 50.0]),
        batch=st.booleans(),
        frozen=st.booleans(),
        seed=st.integers(0, 1000),
    ),
    forms={
        "plain": {"bias": True, "statistics": STATISTICS},
        "filtered": {"bias": True, "grad_filter": 1e-3, "statistics": ("log_sum_exp",)},
        "frozen": {"frozen": True, "statistics": ("log_sum_exp",)},
        "batched": {"batch": True, "bias": True, "entropy": True},
        "batched, frozen": {"batch": True, "frozen": True},
    },
    strided=strided,
    good=GOOD,
    bad=BAD,
)
