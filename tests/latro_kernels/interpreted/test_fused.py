"""Products in registers, where a test looks into the driver: in Triton's interpreter alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from latro_kernels.linear_logprob.triton import blocks, fused
from tests.latro_kernels.ops.linear_logprob import of_a_part, problem
from tests.latro_kernels.ops.op import assert_same

pytestmark = [pytest.mark.interpreted, pytest.mark.usefixtures("small_tiles")]
each_form = pytest.mark.parametrize(
    ("more", "options"),
    [({}, {}), ({"frozen": True}, {}), ({}, {"grad_filter": 1e-20})],
    ids=["plain", "frozen", "filtered"],
)


@each_form
def test_operands_by_descriptor(
    more: dict[str, Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a chip that copies blocks by itself; H and V are no multiples of a block."""
    # Blocks of a size at which NumPy multiplies the same way however they lie in memory.
    block = blocks.Config(rows=32, columns=64, depth=64, warps=4, stages=1)
    monkeypatch.setattr(blocks, "_INTERPRETED", block)
    given = problem((40, 20, 76), torch.bfloat16, bias=True, **more)
    expected = given.solve("triton", **options)
    described = []

    def has_descriptors(device: torch.device) -> bool:
        described.append(device)
        return True

    monkeypatch.setattr(blocks, "has_descriptors", has_descriptors)
    got = given.solve("triton", **options)
    assert described
    assert_same(got, expected)


# Rows of 34 bytes; rows that lie apart by no multiple of 16 bytes; columns that do; rows that begin
# 2 bytes after a multiple; a matrix the other way round; one row for all.
MISFITS: dict[str, Callable[[Tensor], Tensor]] = {
    "odd": lambda t: t[:, :17].contiguous(),
    "wide": lambda t: torch.cat([t, t[:, :3]], 1)[:, :16],
    "apart": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "unaligned": lambda t: torch.cat([t, t], 1)[:, 1:17],
    "turned": lambda t: t.t().contiguous().t(),
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_what_no_descriptor_takes_is_copied(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "has_descriptors", lambda device: True)
    fitting = torch.randn(24, 24).bfloat16()
    assert fused._fitting(fitting) is fitting
    misfit = MISFITS[kind](fitting)
    copy = fused._fitting(misfit)
    assert torch.equal(copy, misfit)
    assert copy.data_ptr() != misfit.data_ptr()
    # Its descriptor is one that Triton takes.
    TensorDescriptor.from_tensor(copy, [16, 16])
    monkeypatch.undo()
    assert fused._fitting(misfit) is misfit


@each_form
def test_a_copied_tile_at_a_time(
    more: dict[str, Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operands that no descriptor takes give the bits of those that are copied as they lie.

    Read by address they give the same up to numpy's products, which on some processors sum in
    another order where an operand is turned.
    """
    # Three tiles of rows, at most 6, in blocks of 4; three of columns.
    given = problem((14, 17, 140), torch.bfloat16, bias=True, **more)
    by_address = given.solve("triton", **options)
    copied = []
    copy = fused._fitting

    def recorded(operand: Tensor) -> Tensor:
        copied.append(operand.shape)
        return copy(operand)

    monkeypatch.setattr(fused, "_fitting", recorded)
    monkeypatch.setattr(blocks, "has_descriptors", lambda device: True)
    turned = given.but(weight=given["weight"].t().contiguous().t())
    results = turned.solve("triton", **options)
    assert_same(results, given.solve("triton", **options))
    assert max(rows for rows, _ in copied) <= fused.TILE_COLUMNS
    for name, value in results.items():
        few = 4 * torch.finfo(value.dtype).eps
        expected = by_address[name]
        limit = few * expected.abs().max().item()
        torch.testing.assert_close(value, expected, rtol=few, atol=limit)


@each_form
def test_any_strides(more: dict[str, Any], options: dict[str, Any]) -> None:
    given = problem((10, 18, 70), torch.bfloat16, bias=True, **more)
    wide = torch.zeros(10, 40, dtype=torch.bfloat16)
    wide[:, ::2][:, :18] = given["hidden"]
    turned = given.but(
        weight=given["weight"].t().contiguous().t(),
        hidden=wide[:, ::2][:, :18],
        bias=given["bias"].repeat_interleave(2)[::2],
    )
    assert_same(turned.solve("triton", **options), given.solve("triton", **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_part_of_the_vocabulary_of_minus_infinity(dtype: torch.dtype) -> None:
    """As a rank may have it: its dx_sum counts for nothing, which it does not as NaN."""
    given = problem((5, 9, 100), dtype, bias=True)
    found = of_a_part(given.but(bias=torch.full_like(given["bias"], -torch.inf)))
    assert (found["row_max"] == -torch.inf).all()
    assert not found["dx_sum"].any()
