"""linear_sample for the tests of all ops."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear

from latro_kernels import LinearSample, linear_sample
from latro_kernels.linear_sample import reference
from tests.latro_kernels.ops import gather_logprob, linear_logprob
from tests.latro_kernels.ops.op import COLUMNS, DTYPES, HIDDEN, INTERPRETED, Op, Problem, Results

FP32, BF16, FP16 = DTYPES
INT64 = torch.iinfo(torch.int64)


def problem(
    shape: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    *,
    rows: str = "random",
    bias: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    seed: int = 0,
) -> Problem:
    """Make a random problem of (N, H, V), with seeds and positions of all 64 bits.

    `rows` is "random", "flat" (all logits nearly equal) or "peaked" (p of one token above 0.999).
    """
    given = linear_logprob.problem(shape, dtype, rows=rows, bias=bias, seed=seed)
    random = torch.Generator().manual_seed(seed)
    numbers = torch.randint(INT64.min, INT64.max, (2, shape[0]), generator=random)
    arguments = {name: given[name] for name in ("hidden", "weight", "bias")}
    arguments |= {"seed": numbers[0], "position": numbers[1]}
    arguments |= {"temperature": temperature, "softcap": softcap}
    return Problem(op=OP, arguments=arguments)


def unfused(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, **more: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Score the tokens that the reference draws in fp64, with logits in the model's dtype.

    Tokens drawn from logits that are less exact would be others.
    """
    exact = [None if t is None else t.double() for t in (hidden, weight, bias)]
    token = reference(exact[0], exact[1], bias=exact[2], **more).token
    z = linear(hidden, weight, bias).float()
    if more["softcap"] is not None:
        z = more["softcap"] * torch.tanh(z / more["softcap"])
    z = z / (more["temperature"] or 1.0)
    policy = torch.distributions.Categorical(logits=z, validate_args=False)
    return token, policy.log_prob(token), policy.entropy()


def formula(hidden: Tensor, weight: Tensor, bias: Tensor, **more: Any) -> Results:
    """Log-prob and entropy from `torch.distributions`, of the tokens that the reference draws."""
    token = reference(hidden, weight, bias=bias, **more).token
    scored = gather_logprob.formula(
        hidden @ weight.T + bias, token, more["temperature"], more["softcap"]
    )
    return {"token": token} | scored


def strided(given: Problem) -> list[Problem]:
    """Rows and columns that lie apart, a transposed weight, one seed for all rows."""
    hidden, weight, bias = (given[name] for name in ("hidden", "weight", "bias"))
    turned = given.but(
        hidden=torch.stack([hidden, hidden], 1)[:, 1],
        weight=weight.t().contiguous().t(),
        bias=bias.repeat_interleave(2)[::2],
        position=torch.stack([given["position"], given["seed"]], 1)[:, 0],
    )
    every_second = given.but(
        hidden=hidden.repeat_interleave(2, 1)[:, ::2],
        weight=weight.repeat_interleave(2, 1)[:, ::2],
        seed=given["seed"][:1].expand(len(hidden)),
    )
    return [turned, every_second]


def _samples() -> list[tuple[tuple[int, int, int], torch.dtype, dict[str, Any]]]:
    plain: list[dict[str, Any]] = [
        {},
        {"bias": True, "temperature": 0},
        {"temperature": 0.7, "softcap": 5.0},
        {"temperature": 1.3, "softcap": 30.0, "bias": True},
    ]
    extremes: list[dict[str, Any]] = [{"rows": "peaked"}, {"rows": "flat"}]
    if INTERPRETED:
        return [
            ((0, 3, 5), FP32, {"bias": True}),
            ((1, 1, 1), FP32, {"bias": True}),
            ((5, 3, 70), FP32, {"softcap": 5.0, "temperature": 0.7}),
            ((10, 7, 70), FP32, {"bias": True, "temperature": 0}),
            ((6, 70, 70), FP32, {"rows": "peaked"}),
            ((6, 9, 70), FP32, {"rows": "flat"}),
            ((0, 3, 5), FP16, {"bias": True}),
            ((1, 1, 1), FP16, {}),
            ((5, 3, 70), FP16, {"bias": True, "softcap": 30.0}),
            ((10, 17, 70), FP16, {"temperature": 0}),
            ((6, 70, 70), FP16, {"rows": "peaked"}),
            ((6, 9, 70), FP16, {"rows": "flat", "temperature": 1.3}),
        ]
    # N, H, V: none; one of everything; odd; prime V; an H for which bf16 is multiplied as such.
    shapes = [(0, 5, 300), (1, 1, 1), (7, 3, 101), (1, 33, 64), (33, 17, 257), (40, 256, 1031)]
    return [*product(shapes, DTYPES, plain), *product([(40, 256, 1031)], DTYPES, extremes)]


GOOD = {
    "hidden": torch.zeros(4, 3),
    "weight": torch.zeros(5, 3),
    "seed": torch.zeros(4, dtype=torch.int64),
    "position": torch.arange(4),
}
BAD = [
    ({"hidden": [1.0]}, TypeError, "hidden: expected a tensor, got list"),
    ({"hidden": torch.zeros(1, 4, 3)}, ValueError, "hidden: expected 2 dimensions, got shape"),
    ({"weight": torch.zeros(5, 2)}, ValueError, r"weight: expected shape \[V, H\].*H = 3"),
    ({"weight": torch.zeros(0, 3)}, ValueError, "weight: .*V > 0"),
    ({"weight": torch.zeros(5, 3).half()}, TypeError, "weight: expected the dtype of hidden"),
    ({"weight": torch.zeros(5, 3, device="meta")}, ValueError, "weight: expected the device"),
    ({"hidden": torch.zeros(4, 3).double()}, TypeError, "hidden: expected dtype torch.float32"),
    ({"bias": torch.zeros(4)}, ValueError, r"bias: expected shape \(5,\).*got 4"),
    ({"bias": torch.zeros(5).bfloat16()}, TypeError, "bias: expected the dtype of hidden"),
    *(
        case
        for name in ("seed", "position")
        for case in (
            ({name: 3}, TypeError, f"{name}: expected a tensor, got int"),
            ({name: torch.zeros(4).int()}, TypeError, f"{name}: expected dtype torch.int64, got"),
            ({name: torch.zeros(3).long()}, ValueError, rf"{name}: expected shape \(4,\).*got 3"),
            ({name: torch.zeros(4, 1).long()}, ValueError, f"{name}: expected one dimension"),
            (
                {name: torch.zeros(4, device="meta").long()},
                ValueError,
                f"{name}: expected the device of hidden, cpu, got meta",
            ),
        )
    ),
    ({"temperature": -1.0}, ValueError, "temperature: expected a finite number above 0, got -1.0"),
    ({"temperature": 1e-40}, ValueError, "temperature: expected a number that fp32 holds"),
    ({"temperature": False}, TypeError, "temperature: expected a float, got bool"),
    ({"temperature": torch.tensor(0)}, TypeError, "temperature: expected a float, got Tensor"),
    ({"temperature": 0, "softcap": 0.0}, ValueError, "softcap: expected a finite number above 0"),
    ({"backend": None}, TypeError, "backend: expected a str, got NoneType"),
    ({"group": 3}, TypeError, "group: expected a ProcessGroup, got int"),
]
OP = Op(
    name="linear_sample",
    function=linear_sample,
    reference=reference,
    unfused=unfused,
    formula=formula,
    outputs=LinearSample._fields,
    rows=("hidden", "seed", "position"),
    columns={"weight": 0, "bias": 0},
    of_rows=lambda N, dtype=FP32, **form: problem((N, HIDDEN, COLUMNS), dtype, **form),
    problem=problem,
    uneven=[(53, 2048, 1203), (1100, 130, 200)],
    samples=_samples(),
    draws=st.builds(
        problem,
        st.tuples(st.integers(0, 40), st.integers(1, 70), st.integers(1, 500)),
        bias=st.booleans(),
        temperature=st.sampled_from([0.0, 1.0, 1.5]),
        softcap=st.sampled_from([None, 2.0, 50.0]),
        seed=st.integers(0, 1000),
    ),
    forms={"plain": {"bias": True}, "greedy": {"temperature": 0}},
    strided=strided,
    good=GOOD,
    bad=BAD,
)
