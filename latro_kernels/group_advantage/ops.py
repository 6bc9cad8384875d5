"""The raw op of `group_advantage`: its schema, its backends and its shapes."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from latro_kernels.dispatch import resolve
from latro_kernels.group_advantage import compiled
from latro_kernels.group_advantage.formulas import reference
from latro_kernels.group_advantage.layout import GroupLayout

torch.library.define(
    "latro_kernels::group_advantage",
    "(Tensor logp, Tensor? ref_logp, Tensor? row_kl, Tensor offsets, Tensor? finished, "
    "int num_generations, int? num_groups, float beta, float answer_weight, str kl, "
    "str unfinished, str backend) -> "
    "(Tensor reward, Tensor answer_logp, Tensor rationale_logp, Tensor kl, Tensor advantage, "
    "Tensor coefficient)",
)


@torch.library.impl("latro_kernels::group_advantage", ("cpu", "cuda"))
def _group_advantage(
    logp: Tensor,
    ref_logp: Tensor | None,
    row_kl: Tensor | None,
    offsets: Tensor,
    finished: Tensor | None,
    num_generations: int,
    num_groups: int | None,
    beta: float,
    answer_weight: float,
    kl: str,
    unfinished: str,
    backend: str,
) -> tuple[Tensor, ...]:
    layout = GroupLayout(
        offsets=offsets, num_generations=num_generations, finished=finished, num_groups=num_groups
    )
    # Resolved here rather than in the public function, for torch.compile cannot trace the search
    # for a library.
    backend = resolve(backend, logp.device, cuda_first=True)
    settings: dict[str, Any] = {"beta": beta, "answer_weight": answer_weight}
    settings |= {"kl": kl, "unfinished": unfinished}
    if backend == "reference":
        doubles: list[Any] = [None if t is None else t.double() for t in (logp, ref_logp, row_kl)]
        out = reference(doubles[0], doubles[1], layout, row_kl=doubles[2], **settings)
        *results, _ = vars(out).values()
        return tuple(result.to(logp.dtype) for result in results)
    outputs = _empty_outputs(logp, offsets)
    _driver(backend).forward(outputs, (logp, ref_logp, row_kl), layout, **settings)
    return outputs


@torch.library.register_fake("latro_kernels::group_advantage")
def _(
    logp: Tensor, ref_logp: Tensor | None, row_kl: Tensor | None, offsets: Tensor, *_: object
) -> tuple[Tensor, ...]:
    return _empty_outputs(logp, offsets)


def _empty_outputs(logp: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
    """Return room for the fields of `GroupAdvantage` but the last: five of [S], and one of [N]."""
    S = offsets.numel() // 2
    return *(logp.new_empty(S) for _ in range(5)), logp.new_empty(logp.numel())


def _driver(backend: str) -> ModuleType:
    """Return the module whose `forward` does the work."""
    if backend != "triton":
        return compiled
    from latro_kernels.group_advantage import triton

    return triton


group_advantage = torch.ops.latro_kernels.group_advantage
