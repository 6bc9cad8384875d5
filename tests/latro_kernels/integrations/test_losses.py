"""Other libraries' call forms: results as from unfused PyTorch, arguments as theirs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from latro_kernels.integrations import losses

V, H = 403, 130


def head(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return hidden [3, 7, H], weight and bias, all with gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 7, H), (V, H), (V,))
    made = [torch.randn(shape, generator=generator) / 4 for shape in shapes]
    return [x.to(dtype).requires_grad_() for x in made]


def targets() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    made = torch.randint(V, (3, 7), generator=generator)
    made[0, 0] = made[1, 3] = made[2, 6] = -100
    return made


def gate(function: Callable[..., Tensor], unfused: Callable[..., Tensor], make: Any) -> None:
    """Hold the result and all gradients to twice the error of the unfused way, plus 1e-5."""
    results = []
    for way, dtype in (
        (function, torch.float32),
        (unfused, torch.float32),
        (unfused, torch.float64),
    ):
        inputs = make(dtype)
        result = way(*inputs)
        upstream = torch.randn(result.shape, generator=torch.Generator().manual_seed(2))
        (result * upstream).sum().backward()
        results.append([result.detach(), *(x.grad for x in inputs)])
    assert results[0][0].shape == results[2][0].shape
    for ours, plain, truth in zip(*results, strict=True):
        assert (ours - truth).abs().max() <= 2 * (plain - truth).abs().max() + 1e-5


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize(("softcap", "shift"), [(None, 0), (2.0, True), (None, 2)])
def test_cut_cross_entropys_form(reduction: str, softcap: float | None, shift: int) -> None:
    def ours(e: Tensor, c: Tensor, bias: Tensor) -> Tensor:
        return losses.linear_cross_entropy(
            e, c, targets(), bias=bias, softcap=softcap, reduction=reduction, shift=shift
        )

    def unfused(e: Tensor, c: Tensor, bias: Tensor) -> Tensor:
        logits = F.linear(e, c, bias)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        # Padding at the front stands for places that nothing predicts.
        logits = F.pad(logits, (0, 0, int(shift), 0))[:, :7]
        target = targets()
        target[:, : int(shift)] = -100
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction=reduction)
        return loss.view(3, 7) if reduction == "none" else loss

    gate(ours, unfused, head)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 0.0), (None, 1e-2), (2.0, 0.3)])
def test_ligers_forms(reduction: str, softcap: float | None, scale: float) -> None:
    options: dict[str, Any] = {"ignore_index": 5, "reduction": reduction}
    more = {"softcap": softcap, "lse_square_scale": scale}
    target = targets().flatten()
    target[target == -100] = 5

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return losses.liger_fused_linear_cross_entropy(
            x.flatten(0, 1), weight, target, bias, **options, **more
        )

    def module(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        loss = losses.LigerFusedLinearCrossEntropyLoss(**options, **more)
        return loss(weight, x.flatten(0, 1), target, bias)

    def unfused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logits = F.linear(x.flatten(0, 1), weight, bias)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        kept = target != 5
        z_loss = scale * logits.logsumexp(-1).square() * kept
        z_loss = {"none": z_loss, "sum": z_loss.sum(), "mean": z_loss.sum() / kept.sum()}[reduction]
        return F.cross_entropy(logits, target, **options) + z_loss

    gate(function, unfused, head)
    gate(module, unfused, head)


def test_wrong_reductions_and_shifts_are_refused() -> None:
    e, c, _ = head()
    with pytest.raises(ValueError, match="reduction: expected none, sum or mean, got 'batch'"):
        losses.linear_cross_entropy(e, c, targets(), reduction="batch")
    for shift in (-1, 7):
        with pytest.raises(ValueError, match=rf"shift: expected 0\.\.6, got {shift}"):
            losses.linear_cross_entropy(e, c, targets(), shift=shift)


def logits(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(3, 7, V, generator=generator).mul(4).to(dtype).requires_grad_()]


@pytest.mark.parametrize("k", [None, 1, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_selective_log_softmax(k: int | None, masked: bool) -> None:
    shape = (3, 7) if k is None else (3, 7, k)
    index = torch.randint(V, shape, generator=torch.Generator().manual_seed(4), dtype=torch.int32)
    mask = torch.ones(3, 7, dtype=torch.int64)
    if masked:
        mask[0, :3] = mask[2, 6] = 0
        index[2, 6] = -100

    def ours(z: Tensor) -> Tensor:
        return losses.selective_log_softmax(z, index, 0.7, row_mask=mask if masked else None)

    def unfused(z: Tensor) -> Tensor:
        columns = (index if k is not None else index[..., None]).long().clamp(min=0)
        logp = (z / 0.7).log_softmax(-1).gather(-1, columns) * mask[..., None]
        return logp.view(shape)

    gate(ours, unfused, logits)
    exact = losses.selective_log_softmax(logits(torch.float64)[0], index.clamp(min=0))
    assert exact.dtype == torch.float64


def test_a_mask_may_leave_out_columns_of_a_row() -> None:
    """As TRL's mask does, which has the shape of index."""
    generator = torch.Generator().manual_seed(4)
    index = torch.randint(V, (3, 7, 4), generator=generator)
    mask = torch.randint(2, (3, 7, 4), generator=generator)
    mask[2, 6] = 0

    def ours(z: Tensor) -> Tensor:
        return losses.selective_log_softmax(z, index.masked_fill(mask == 0, -100), row_mask=mask)

    def unfused(z: Tensor) -> Tensor:
        return z.log_softmax(-1).gather(-1, index) * mask

    gate(ours, unfused, logits)
    with pytest.raises(ValueError, match=r"row_mask: expected shape \(3, 7, 4\), as index has, or"):
        losses.selective_log_softmax(logits(torch.float32)[0], index, row_mask=mask[:, :2])


def test_masked_columns_spoil_no_others() -> None:
    """A logit of −∞ is masked; where it is asked for, its own log-prob alone is −∞."""
    index = torch.tensor([[2, 1, 3], [1, 2, 3], [2, 2, 2], [4, 5, 6]])
    z = torch.randn(4, 9, generator=torch.Generator().manual_seed(5))
    z[:, 2] = -torch.inf
    upstream = torch.randn(4, 3, generator=torch.Generator().manual_seed(6))
    found = []
    for function in (losses.selective_log_softmax, unfused_selective):
        inputs = z.clone().requires_grad_()
        logp = function(inputs, index)
        logp.backward(upstream)
        found.append((logp.detach(), inputs.grad))
    (ours, gradient), (plain, expected) = found
    assert torch.equal(ours.isinf(), index == 2)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(gradient, expected)


def unfused_selective(z: Tensor, index: Tensor) -> Tensor:
    return z.log_softmax(-1).gather(-1, index)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_a_batch_without_rows(reduction: str) -> None:
    e, c, target = torch.zeros(0, H), torch.zeros(V, H), torch.zeros(0, dtype=torch.int64)
    expected = F.cross_entropy(F.linear(e, c), target, reduction=reduction)
    for function in (losses.linear_cross_entropy, losses.liger_fused_linear_cross_entropy):
        found = function(e, c, target, reduction=reduction)
        torch.testing.assert_close(found, expected, equal_nan=True)
    found = losses.linear_cross_entropy(e, c, target, reduction=reduction, shift=1)
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_entropy_from_logits() -> None:
    def unfused(z: Tensor) -> Tensor:
        log_p = z.log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1)

    gate(losses.entropy_from_logits, unfused, logits)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("trl.trainer.utils", "selective_log_softmax"),
        ("trl.trainer.utils", "entropy_from_logits"),
        ("cut_cross_entropy", "linear_cross_entropy"),
        ("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"),
    ],
)
def test_arguments_are_the_librarys(module: str, name: str) -> None:
    """Where the library is installed: its arguments, as far as we have them, in its order."""
    library, *_ = module.split(".")
    pytest.importorskip(library, reason=f"needs {library}")
    theirs = inspect.signature(getattr(import_module(module), name)).parameters
    ours = dict(inspect.signature(getattr(losses, name)).parameters)
    if library == "cut_cross_entropy" and "bias" not in theirs:
        ours = {n: p for n, p in ours.items() if n != "bias"}  # its release on PyPI has none
    moved = [n for n in ours if n not in theirs or ours[n].default != theirs[n].default]
    assert not moved, f"{library}: {name} has no longer {moved} as they are here"
    by_place = [n for n, p in ours.items() if p.kind != p.KEYWORD_ONLY]
    assert by_place == list(theirs)[: len(by_place)], f"{library}: {name} has another order"
