"""Leave-one-out advantages of sampled groups, and the coefficient they give to every row.

A prompt has K sampled sequences, each a rationale z and then the answer y; a packed batch holds one
log-probability per token of both. Sums run over the rows of a segment:

    answer_logp_s = Σ_answer logp                 rationale_logp_s = Σ_rationale logp
    kl="reward":    kl_s = Σ_rationale (logp − ref_logp)    reward_s = answer_logp_s − β·kl_s
    kl="exact":     kl_s = Σ_rationale row_kl               reward_s = answer_logp_s − β·kl_s
    kl="k3":        kl_s = Σ_rationale (exp(d) − d − 1)     reward_s = answer_logp_s
                    with d = ref_logp − logp
    advantage_k   = reward_k − mean_{j≠k} reward_j = m/(m−1)·(reward_k − mean reward)

with the means over the m sequences of the group that count. The loss to minimise is linear in logp,

    loss = Σ_rows coefficient·logp,   c = 1/(num_groups·K)   [+ Σ_rows kl_coefficient·row_kl]
    coefficient = −c·advantage_s                               on rationale rows
                  −c·advantage_s − c·β·(exp(d) − 1)            on rationale rows, kl="k3"
                  −c·answer_weight                             on answer rows
    kl_coefficient = c·β                                       on rationale rows, kl="exact"

so there is no backward here: the coefficients are constants, and logp has its own backward. The sum
in brackets is there with kl="exact"; its gradient goes through row_kl, that is through `linear_kl`,
and not through logp.

In expectation over the sequences, with λ = 1 and all of them finished, the loss follows, with
"reward" as with "exact", the gradient of

    E_z[log π(y|x⊕z)] − β·KL(π(z|x) ‖ π_0(z|x))

where the KL is that of whole sequences. ∇KL = E[Σ_t ∇row_kl_t + Σ_s ∇logp_s·Σ_{t>s} row_kl_t]: a
token's choice changes the KL of its own row, and those of the rows that it leads to. "reward"
estimates all of it by sampled tokens; "exact" has the first sum over the whole vocabulary, and in
the second, in place of a sampled log-ratio, its mean over the vocabulary, so that it varies less.
The rows t ≤ s, which the reward sums too, have expectation 0: given the tokens before s, they do
not depend on it. "k3" follows Σ_t KL(π_0 ‖ π) of the rows, the other way round, with the sequences
that lead to them held constant: a policy does not learn from it to avoid rows of high KL.

Formulas: "Language Models are Hidden Reasoners", arXiv 2411.04282; the k3 estimate is
Schulman's, http://joschu.net/blog/kl-approx.html.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latro_kernels.checks import (
    check_choice,
    check_device,
    check_number,
    check_same,
    check_vector,
)
from latro_kernels.group_advantage import ops
from latro_kernels.group_advantage.formulas import segment_of_rows
from latro_kernels.group_advantage.layout import GroupAdvantage, GroupLayout

KL_FORMS = ("reward", "k3", "exact")
UNFINISHED_RULES = ("floor", "exclude")


def group_advantage(
    logp: Tensor,
    ref_logp: Tensor | None,
    layout: GroupLayout,
    *,
    beta: float = 0.05,
    answer_weight: float = 1.0,
    kl: str = "reward",
    unfinished: str = "floor",
    row_kl: Tensor | None = None,
    backend: str = "auto",
) -> GroupAdvantage:
    """Return rewards, leave-one-out advantages and the coefficient of every row in the loss.

    With sequences of one rationale and one answer row, logp [G, K, 2] and the default forms
    of kl and unfinished, this is

        reward = answer_logp - beta * (rationale_logp - ref_rationale_logp)
        advantage = (reward - reward.mean(1, keepdim=True)) * K / (K - 1)
        coefficient = -torch.stack([advantage, torch.ones_like(advantage)], -1) / (G * K)

    and the update is `(coefficient.detach() * logp).sum().backward()`, with
    `(kl_coefficient * row_kl).sum()` added where kl is "exact". Sums are carried in fp64.
    NaN in a sequence makes every advantage of its group NaN and touches no other group; with
    unfinished="exclude" a sequence that is left out passes nothing on.

    Args:
        logp: [N] fp32, nats: log π(token) of each row. backend="reference" takes fp64 too, and
            returns it. No gradient flows through this function.
        ref_logp: [N] like logp: log π_0(token); answer rows may hold anything. None: beta is 0, or
            kl is "exact", which has no use for it.
        layout: the segments and groups of the N rows.
        beta: weight of the KL term, at least 0.
        answer_weight: λ, weight of the answers' own log-likelihood in the loss.
        kl: "reward", Σ log-ratio in the reward, as published; "exact", `row_kl` in the reward and
            in the loss, the same gradient with less variance; "k3", the k3 estimate in the loss.
        unfinished: "floor", an unfinished sequence has the lowest reward of its group; "exclude",
            it is left out of the baseline and has coefficient 0 on all rows, and where fewer than
            two are left all advantages of the group are 0.
        row_kl: [N] like logp, with kl="exact" only: KL(π ‖ π_0) of each row's distribution, as from
            `linear_kl`; answer rows may hold anything. None there: beta is 0.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or value; on the CPU also offsets that do
            not ascend from 0 to N (elsewhere unchecked: see `GroupLayout.check`).
        BackendUnavailableError: the backend cannot run here.
    """
    if not isinstance(layout, GroupLayout):
        raise TypeError(f"layout: expected a GroupLayout, got {type(layout).__name__}")
    if backend == "reference":
        check_vector("logp", logp, torch.float32, torch.float64)
    else:
        check_vector("logp", logp, torch.float32)
    check_device("layout.offsets", layout.offsets, "logp", logp)
    check_number("beta", beta)
    check_number("answer_weight", answer_weight)
    if beta < 0:
        raise ValueError(f"beta: expected 0 or more, got {beta}")
    check_choice("kl", kl, KL_FORMS)
    wanted = "row_kl" if kl == "exact" else "ref_logp"
    for name, value in (("ref_logp", ref_logp), ("row_kl", row_kl)):
        if value is not None:
            check_vector(name, value, logp.dtype)
            check_same(name, value, logp.shape, logp.device)
            if name != wanted:
                raise ValueError(f"{name}: expected None with kl={kl!r}, got a tensor")
        elif beta != 0 and name == wanted:
            raise ValueError(
                f"{name}: expected a tensor where beta is not 0, got None, beta={beta}, kl={kl!r}"
            )
    check_choice("unfinished", unfinished, UNFINISHED_RULES)

    outputs = ops.group_advantage(
        logp.detach().contiguous(),
        None if ref_logp is None else ref_logp.detach().contiguous(),
        None if row_kl is None else row_kl.detach().contiguous(),
        layout.offsets.contiguous(),
        None if layout.finished is None else layout.finished.contiguous(),
        num_generations=layout.num_generations,
        num_groups=layout.num_groups,
        beta=float(beta),
        answer_weight=float(answer_weight),
        kl=kl,
        unfinished=unfinished,
        backend=backend,
    )
    kl_coefficient = None
    if row_kl is not None:
        weight = beta / layout.num_averaged
        kl_coefficient = _kl_coefficient(row_kl.detach(), layout, weight, unfinished)
    results = (*outputs, kl_coefficient)
    return GroupAdvantage(*results)


def _kl_coefficient(row_kl: Tensor, layout: GroupLayout, weight: float, unfinished: str) -> Tensor:
    """Return `weight` on the rationale rows of the sequences that count, 0 elsewhere."""
    segment = segment_of_rows(layout.offsets, row_kl.numel())
    counts = segment % 2 == 0
    if unfinished == "exclude" and layout.finished is not None:
        counts &= layout.finished[segment // 2]
    return torch.where(counts, weight, torch.zeros_like(row_kl))
