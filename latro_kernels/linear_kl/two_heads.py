"""Check the arguments of ops of two heads; give their reference and their backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from latro_kernels.checks import (
    check_batch,
    check_device,
    check_float_dtype,
    check_same_dtype,
    check_scales,
    check_tensor,
    check_type,
)
from latro_kernels.head import autocast, reference_logits
from latro_kernels.head_gradient import empty_gradients


def checked(
    p: dict[str, Any], q: dict[str, Any], temperature: object, softcap: object, backend: str
) -> dict[str, Any]:
    """Return p's hidden, weight and bias and those of q, in the dtype of products.

    Raise for what is wrong with them, or with the scales of either.
    """
    tensors = p | q
    given = {name: t for name, t in tensors.items() if t is not None or "bias" not in name}
    _check_tensors(given)
    _check_shapes(given)
    for of_head in scales_of_heads(temperature, softcap):
        check_scales(*of_head)
    check_type("backend", backend, str)
    given = {name: autocast(tensor) for name, tensor in given.items()}
    _check_dtypes(given, backend)
    return tensors | given


def settings_of_heads(temperature: Any, softcap: Any) -> tuple[float, float, float, float]:
    """Return p's temperature and softcap, and those of q, as raw ops take them."""
    p, q = (
        (float(of_head[0]), float(of_head[1] or 0.0))
        for of_head in scales_of_heads(temperature, softcap)
    )
    return (*p, *q)


def scales_of_heads(temperature: Any, softcap: Any) -> list[tuple[Any, Any]]:
    """Return temperature and softcap of p, and those of q; each is given as one or as a pair."""
    pairs = []
    for name, given in (("temperature", temperature), ("softcap", softcap)):
        pair = given if isinstance(given, (tuple, list)) else (given, given)
        if len(pair) != 2:
            raise ValueError(
                f"{name}: expected one for both heads or a pair, of p and of q, got {given!r}"
            )
        pairs.append(pair)
    return list(zip(*pairs, strict=True))


def reference_log_softmax(
    p: tuple[Tensor, Tensor, Tensor | None],
    q: tuple[Tensor, Tensor, Tensor | None],
    temperature: Any,
    softcap: Any,
) -> list[Tensor]:
    """Return log p and log q [..., V] of hidden, weight and bias of each, by plain PyTorch."""
    return [
        torch.log_softmax(reference_logits(*head, of_head[1]) / of_head[0], dim=-1)
        for head, of_head in zip((p, q), scales_of_heads(temperature, softcap), strict=True)
    ]


def rows_of(tensors: dict[str, Any]) -> dict[str, Any]:
    """Return the tensors with hidden states [N, H], of which there may be more dimensions.

    What both heads share is a view of it in q: torch.compile cannot trace an autograd function that
    is given one tensor twice.
    """
    hidden = ((name, tensors[name]) for name in ("hidden_p", "hidden_q"))
    given = tensors | {name: h.reshape(-1, h.shape[-1]) for name, h in hidden}
    for kind in ("hidden", "weight", "bias"):
        of_p, of_q = given[f"{kind}_p"], given[f"{kind}_q"]
        if of_q is not None and of_q is of_p:
            given[f"{kind}_q"] = of_q.view_as(of_q)
    return given


def backward(
    name: str, op: Callable[..., Sequence[Tensor]], ctx: Any, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Return what an autograd function's `backward` does, of the settings and of both heads.

    Args:
        name: the name of the op, for a message.
        op: the raw op of the backward.
        ctx: has saved hidden, weight and bias of p and of q, and what the forward found of rows;
            and has `settings`, all else that the raw op of the forward took.
        grad: [N], the upstream gradient.

    Raises:
        RuntimeError: a gradient of the gradients is asked for.
    """
    # once_differentiable would let a gradient penalty go by with a gradient of zero.
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} has no double backward; use backend='reference' for create_graph"
        )
    # Once: activation checkpointing makes what was saved again, and gives it out a single time.
    saved = ctx.saved_tensors
    heads, rows = saved[:6], saved[6:]
    wanted: list[Tensor | None] = []
    # The inputs are the settings, then hidden, weight and bias of p and those of q.
    for of_q, needs in ((False, ctx.needs_input_grad[1:4]), (True, ctx.needs_input_grad[4:])):
        gradients: Sequence[Tensor | None] = (None,) * 3
        if any(needs):
            gradients = op(*heads, *ctx.settings, *rows, grad, of_q, needs)
        wanted += (g if needed else None for g, needed in zip(gradients, needs, strict=True))
    return None, *wanted


def empty_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Return room for the gradients of one head, given the arguments of a raw backward op."""
    *_, of_q, needs = arguments
    hidden, weight = arguments[3:5] if of_q else arguments[:2]
    return empty_gradients(hidden, weight, needs)


def _check_tensors(given: dict[str, Tensor]) -> None:
    """Check types, dimensions and devices."""
    for name, tensor in given.items():
        if name.startswith("hidden"):
            check_batch(name, tensor)
        else:
            check_tensor(name, tensor, 1 if name.startswith("bias") else 2)
        check_device(name, tensor, "hidden_p", given["hidden_p"])


def _check_shapes(given: dict[str, Tensor]) -> None:
    V = len(given["weight_p"])
    batch, other = (given[name].shape[:-1] for name in ("hidden_p", "hidden_q"))
    if other != batch:
        raise ValueError(
            f"hidden_q: expected shape {(*batch, 'Hq')}, as hidden_p has rows, "
            f"got {tuple(given['hidden_q'].shape)}"
        )
    for head, expected in (("p", "V > 0"), ("q", f"V = {V}, as in weight_p,")):
        H, weight = given[f"hidden_{head}"].shape[-1], given[f"weight_{head}"]
        if V == 0 or H == 0 or weight.shape != (V, H):
            raise ValueError(
                f"weight_{head}: expected shape [V, H] with {expected} and H = {H} > 0, as in "
                f"hidden_{head}, got {tuple(weight.shape)}"
            )
        bias = given.get(f"bias_{head}")
        if bias is not None and len(bias) != V:
            raise ValueError(
                f"bias_{head}: expected shape ({V},), as weight_{head} has rows, got {len(bias)}"
            )


def _check_dtypes(given: dict[str, Tensor], backend: str) -> None:
    check_float_dtype("hidden_p", given["hidden_p"], backend)
    for name, tensor in given.items():
        check_same_dtype(name, tensor, "hidden_p", given["hidden_p"])
