"""What every op says to wrong arguments: the name, what was expected, and what came."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from latro_kernels import GroupLayout, group_advantage
from tests.latro_kernels.ops.op import BadInputs, Op
from tests.latro_kernels.ops.table import (
    DIFFERENTIABLE,
    GATHER_LOGPROB,
    GROUP_ADVANTAGE,
    LINEAR_LOGPROB,
    OPS,
    each_op,
)

OF_EVERY_OP: BadInputs = [
    ({"backend": "fast"}, ValueError, "backend: expected 'auto' or one of"),
    ({"backend": "cuda"}, (ValueError, RuntimeError), "backend 'cuda'"),
    ({"backend": "triton"}, ValueError, "backend 'triton': expected tensors on cuda, got cpu"),
]
OF_LOG_PROBS: BadInputs = [
    ({"target": torch.zeros(3).long()}, ValueError, r"target: expected shape \(4,\).*got \(3,\)"),
    (
        {"target": torch.zeros(4, 1).long()},
        ValueError,
        r"target: expected shape \(4,\).*got \(4, 1",
    ),
    ({"target": [0, 1, 2, 3]}, TypeError, "target: expected a tensor, got list"),
    ({"target": torch.zeros(4).int()}, TypeError, "target: expected dtype torch.int64"),
    ({"target": torch.tensor([0, 4, 5, 9])}, ValueError, r"0\.\.4, got 5 in row 2"),
    ({"target": torch.tensor([0, 4, -1, 9])}, ValueError, r"0\.\.4, got -1 in row 2"),
    ({"target": torch.full((4,), 5), "backend": "reference"}, ValueError, "got 5 in row 0"),
    ({"ignore_index": -100.0}, TypeError, "ignore_index: expected an int, got float"),
    ({"ignore_index": True}, TypeError, "ignore_index: expected an int, got bool"),
    ({"ignore_index": 2**63}, ValueError, "ignore_index: expected an int that int64 holds, got 9"),
    ({"return_entropy": 1}, TypeError, "return_entropy: expected a bool, got int"),
    ({"statistics": "entropy"}, TypeError, "statistics: expected a collection of names.*'entropy'"),
    ({"statistics": 3}, TypeError, "statistics: expected a collection of names, .*got 3"),
    ({"statistics": ["lse"]}, ValueError, "statistics: expected names among 'entropy', .*'lse'"),
    ({"statistics": {"logp"}}, ValueError, "statistics: expected names among .*, got 'logp'"),
    ({"statistics": [["entropy"]]}, ValueError, r"statistics: .*, got \['entropy'\]"),
    (
        {"statistics": {"log_sum_exp"}, "return_entropy": True},
        ValueError,
        "return_entropy: expected False with statistics",
    ),
    *(
        (
            {"target": torch.tensor([0, -100, -1, 9]), "ignore_index": -100, "backend": backend},
            ValueError,
            r"0\.\.4, got -1 in row 2",
        )
        for backend in ("auto", "reference")
    ),
]
CASES = [
    (op, *case)
    for op in OPS
    for case in (
        *op.bad,
        *OF_EVERY_OP,
        *(OF_LOG_PROBS if op in (LINEAR_LOGPROB, GATHER_LOGPROB) else []),
    )
]


@pytest.mark.parametrize(
    ("op", "change", "error", "message"),
    [pytest.param(*c, id=f"{c[0].name}: {c[3]}") for c in CASES],
)
def test_wrong_arguments(op: Op, change: dict[str, Any], error: Any, message: str) -> None:
    op.function(**op.good)
    with pytest.raises(error, match=message):
        op.function(**(op.good | change))


@each_op(DIFFERENTIABLE)
def test_the_backend_is_a_name(op: Op) -> None:
    with pytest.raises(TypeError, match="backend: expected a str, got NoneType"):
        op.function(**op.good, backend=None)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@each_op(DIFFERENTIABLE)
@pytest.mark.parametrize("name", ["temperature", "softcap"])
@pytest.mark.parametrize(
    "value", [1e-50, 1e-40, 1e39, 10**400, 0.0, -1.0, float("nan"), float("inf")]
)
def test_such_a_scale_is_refused(value: float, name: str, op: Op, backend: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got [^\n]*$"):
        op.function(**op.good, **{name: value}, backend=backend)
    for wrong in (True, "1", torch.tensor(1.0)):
        with pytest.raises(TypeError, match=rf"^{name}: expected a float, got [^\n]*$"):
            op.function(**op.good, **{name: wrong}, backend=backend)


@each_op(DIFFERENTIABLE)
def test_a_softcap_that_the_temperature_makes_vanish(op: Op) -> None:
    """The largest logit, softcap / temperature, would be 0, and 0 · inf a gradient of NaN."""
    with pytest.raises(
        ValueError, match=r"softcap: expected 1\.18e-08 or more with temperature=1e"
    ):
        op.function(**op.good, temperature=1e30, softcap=1e-30)
    op.function(**op.good, temperature=1e30, softcap=1e-7)


def test_a_layout_is_one() -> None:
    given = GROUP_ADVANTAGE.good
    with pytest.raises(TypeError, match="layout: expected a GroupLayout, got Tensor"):
        group_advantage(given["logp"], given["ref_logp"], given["offsets"])


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 2, 3, 4, 6], "expected first 0 and last 6, the number of rows, got 1 and 6"),
        ([0, 2, 3, 4, 9], "expected first 0 and last 6, the number of rows, got 0 and 9"),
        ([0, 3, 2, 4, 6], "expected ascending values, got 3 then 2 at 1"),
        ([0, 1, 9, 2, 6], "expected ascending values, got 9 then 2 at 2"),
        ([0, 0, 2, 6, 6], "answer of one row or more, got none for sequence 1"),
    ],
)
def test_offsets_are_checked(offsets: list[int], message: str) -> None:
    layout = GroupLayout(torch.tensor(offsets), 2)
    with pytest.raises(ValueError, match=message):
        layout.check(6)
    if "answer" not in message:
        with pytest.raises(ValueError, match=message):
            group_advantage(torch.zeros(6), torch.zeros(6), layout, backend="cpu")
    GroupLayout(torch.tensor([0, 0, 2, 4, 6]), 2).check(6)
