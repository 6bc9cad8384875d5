"""What every op says to wrong arguments: the name, what was expected, and what came."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from latro_kernels import (
    GroupLayout,
    floored,
    group_advantage,
    leave_one_out,
    segment_of_rows,
    segment_sums,
)
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
        for backend in ("cpu", "reference"):
            with pytest.raises(ValueError, match=message):
                group_advantage(torch.zeros(6), torch.zeros(6), layout, backend=backend)
        with pytest.raises(ValueError, match=message):
            segment_sums(torch.zeros(6), layout.offsets)
        with pytest.raises(ValueError, match=message):
            segment_of_rows(layout.offsets, 6)
    GroupLayout(torch.tensor([0, 0, 2, 4, 6]), 2).check(6)


@pytest.mark.parametrize(("function", "name"), [(floored, "finished"), (leave_one_out, "member")])
def test_rewards_and_the_mask_beside_them(function: Any, name: str) -> None:
    reward, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    function(reward, mask)
    for wrong, message in (
        (mask.long(), r"expected dtype torch\.bool, got torch\.int64"),
        (mask.float(), r"expected dtype torch\.bool, got torch\.float32"),
        (mask.tolist(), "expected a tensor, got list"),
    ):
        with pytest.raises(TypeError, match=f"^{name}: {message}"):
            function(reward, wrong)
    for wrong in (mask[0], mask[:1]):
        with pytest.raises(ValueError, match=rf"^{name}: expected shape \(2, 3\), got \("):
            function(reward, wrong)
    with pytest.raises(TypeError, match=r"^reward: expected dtype .*, got torch\.int64"):
        function(reward.long(), mask)
    with pytest.raises(ValueError, match=r"^reward: expected 2 dimensions, got shape \(3,\)"):
        function(reward[0], mask[0])


def test_rows_and_their_segments() -> None:
    rows, offsets = torch.zeros(3), torch.tensor([0, 1, 3])
    for wrong, error, message in (
        (offsets.int(), TypeError, r"expected dtype torch\.int64, got torch\.int32"),
        (offsets.tolist(), TypeError, "expected a tensor, got list"),
        (offsets[None], ValueError, r"expected one dimension, got shape \(1, 3\)"),
        (offsets[:0], ValueError, r"expected segments \+ 1 entries, got 0"),
    ):
        with pytest.raises(error, match=f"^offsets: {message}"):
            segment_sums(rows, wrong)
        with pytest.raises(error, match=f"^offsets: {message}"):
            segment_of_rows(wrong, 3)
    with pytest.raises(TypeError, match=r"^num_rows: expected an int, got float"):
        segment_of_rows(offsets, 3.0)
    with pytest.raises(TypeError, match=r"^rows: expected dtype .*, got torch\.int64"):
        segment_sums(rows.long(), offsets)
    with pytest.raises(ValueError, match=r"^rows: expected 1 dimension, got shape \(3, 1\)"):
        segment_sums(rows[:, None], offsets)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_building_blocks_are_compiled_whole(device: str) -> None:
    """Their checks read values on the CPU, and none of a tensor that is traced or has none."""
    reward, mask = torch.zeros(1, 2, device=device), torch.ones(1, 2, device=device) > 0
    offsets = torch.tensor([0, 1, 3], device=device)

    def all_of_them() -> Any:
        sums = segment_sums(torch.zeros(3, device=device), offsets)
        return sums, segment_of_rows(offsets, 3), floored(reward, mask), leave_one_out(reward, mask)

    torch.compiler.reset()
    compiled = torch.compile(all_of_them, fullgraph=True, backend="aot_eager")
    assert [t.shape for t in compiled()] == [t.shape for t in all_of_them()]
