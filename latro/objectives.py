"""LaTRO and its relatives: from per-row log-probs to one constant coefficient per row.

Every objective here is a policy gradient on rationales and a weighted likelihood gradient on
answers, so that all of them are the loss Σ_rows coefficient·logp and differ in two numbers a
sequence, A and w. With ℓ_k = log π(y|x⊕z_k), means over the m sequences of a group that count,
c = 1/(num_groups·K) and λ = answer_weight:

    coefficient = −c·A_k on rationale rows, −c·w_k on answer rows

               A_k, before the KL                                           w_k
    latro      ℓ_k − mean_{j≠k} ℓ_j                                         λ
    verifree   e^ℓ_k − mean_{j≠k} e^ℓ_j                                     λ·e^ℓ_k
    jepo       m·(log mean_j e^ℓ_j − log mean_{j≠k} e^ℓ_j)                  λ·m·softmax_k(ℓ)
    rlpr       (R_k − mean_j R_j) / std_j R_j, R_k = clip(p_k − p_0, 0, 1)  0
    sft        0                                                            λ

where p is the mean probability of the answer's own tokens, without those of template and end, p_k
after x⊕z_k and p_0 after x alone.

The KL to π_0 is the same term in all of them, in the forms of `latro_kernels.group_advantage`. With
kl="reward" and "exact" its policy gradient is −β·(kl_k − mean_{j≠k} kl_j), added to A_k: whatever
the scale of an objective's own A, β weighs nats of KL against that objective. With "exact" the
rows' own KL stands in the loss beside it; with "k3" all of the KL does.

Unfinished rationales: with "floor" A is made as if their reward were the lowest of the group, and
their KL the highest; w stays their own. (In latro it is the sum of the two that is floored.) With
"exclude" they count nowhere and have coefficient 0.

latro's reward may leave out rows of the answer, the template's or the end token's, by
`Rows.unrewarded`: ℓ_k in A_k is then the sum over the other rows, and λ's gradient is still that of
the whole ℓ_k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from latro_kernels import (
    GroupAdvantage,
    GroupLayout,
    floored,
    group_advantage,
    leave_one_out,
    segment_of_rows,
    segment_sums,
)


@dataclass(frozen=True, eq=False)
class Rows:
    """What forwards of the policy and of the reference give for the rows of whole groups.

    Args:
        logp: [N] fp32, nats: log π(token). fp64 goes through as fp64 (latro: with
            backend="reference"). No gradient flows through an objective.
        layout: the segments and groups of the N rows.
        ref_logp: [N] like logp: log π_0(token); answer rows may hold anything. Needed where β is
            not 0 and kl is "reward" or "k3".
        row_kl: [N] like logp: KL(π ‖ π_0) of a row's distribution; answer rows may hold anything.
            Needed where β is not 0 and kl is "exact".
        own_answer: bool [N]: the rows of the answers' own tokens, which are not the answer
            template's and not the end token. Needed by rlpr.
        plain_logp: [P] like logp: log π of each of the answer's own tokens after the prompt alone,
            one answer a group. Needed by rlpr.
        plain_offsets: int64 [G + 1], ascending from 0 to P: rows plain_offsets[g]:plain_offsets[g +
            1] are group g's.
        unrewarded: bool [N], False at rationale rows: the answer rows that are no part of the
            reward, though they have their likelihood gradient; None: there are none. Read by latro,
            refused by the others, whose rewards are defined otherwise.

    Raises:
        TypeError: a mask that is not bool.
        ValueError: a tensor of the wrong shape.
    """

    logp: Tensor
    layout: GroupLayout
    ref_logp: Tensor | None = None
    row_kl: Tensor | None = None
    own_answer: Tensor | None = None
    plain_logp: Tensor | None = None
    plain_offsets: Tensor | None = None
    unrewarded: Tensor | None = None

    def __post_init__(self) -> None:
        if self.logp.dim() != 1:
            raise ValueError(f"logp: expected [N], got shape {tuple(self.logp.shape)}")
        groups = self.layout.num_sequences // self.layout.num_generations
        for name, value, shape in (
            ("ref_logp", self.ref_logp, self.logp.shape),
            ("row_kl", self.row_kl, self.logp.shape),
            ("own_answer", self.own_answer, self.logp.shape),
            ("unrewarded", self.unrewarded, self.logp.shape),
            ("plain_offsets", self.plain_offsets, (groups + 1,)),
        ):
            if value is not None and value.shape != shape:
                raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(value.shape)}")
        for name, mask in (("own_answer", self.own_answer), ("unrewarded", self.unrewarded)):
            if mask is not None and mask.dtype != torch.bool:
                raise TypeError(f"{name}: expected dtype torch.bool, got {mask.dtype}")
        if (self.plain_logp is None) != (self.plain_offsets is None):
            raise ValueError("plain_logp, plain_offsets: expected both or neither, got one")


@dataclass(frozen=True)
class ObjectiveSettings:
    """The settings of the objectives, as in `latro_kernels.group_advantage`.

    Args:
        beta: β, weight of the KL term, at least 0.
        answer_weight: λ, weight of the answers' likelihood gradient; rlpr has none.
        kl: "reward", "k3" or "exact".
        unfinished: "floor" or "exclude".
        rlpr_min_std: groups whose rewards spread no further than this are dropped by rlpr.
        backend: of `group_advantage`, which is latro; the others are plain PyTorch.
    """

    beta: float = 0.05
    answer_weight: float = 1.0
    kl: str = "reward"
    unfinished: str = "floor"
    rlpr_min_std: float = 0.01
    backend: str = "auto"


Objective = Callable[[Rows, ObjectiveSettings], GroupAdvantage]


class _Groups:
    """The sequences of a batch in their groups; all is fp64 [G, K] where nothing else is said."""

    def __init__(self, rows: Rows, settings: ObjectiveSettings) -> None:
        if rows.unrewarded is not None:
            raise ValueError("unrewarded: expected None for objectives but latro, got a tensor")
        wanted, unwanted = "ref_logp", "row_kl"
        if settings.kl == "exact":
            wanted, unwanted = unwanted, wanted
        if getattr(rows, unwanted) is not None:
            raise ValueError(f"{unwanted}: expected None with kl={settings.kl!r}, got a tensor")
        if settings.beta != 0 and getattr(rows, wanted) is None:
            raise ValueError(
                f"{wanted}: expected a tensor where beta is not 0, got None, "
                f"beta={settings.beta}, kl={settings.kl!r}"
            )
        layout, logp = rows.layout, rows.logp.detach().double()
        self.layout, self.settings, self.dtype = layout, settings, rows.logp.dtype
        self.logp = logp
        """[N]."""
        self.drift = torch.zeros_like(logp)
        """[N], log π_0 − log π of the token; 0 where it is not known."""
        if rows.ref_logp is not None:
            self.drift = rows.ref_logp.detach().double() - logp
        self.has_row_kl = rows.row_kl is not None
        row_kl = -self.drift
        if rows.row_kl is not None:
            row_kl = rows.row_kl.detach().double()
        elif settings.kl == "k3":
            row_kl = self.drift.expm1() - self.drift
        self.rationale_logp, self.answer_logp = self._sums(logp)
        self.kl, _ = self._sums(row_kl)
        everyone = torch.ones_like(self.kl, dtype=torch.bool)
        finished = everyone if layout.finished is None else layout.finished.view_as(everyone)
        exclude = settings.unfinished == "exclude"
        self.member = finished if exclude else everyone
        """bool: the sequences that count."""
        self._own_reward = everyone if exclude else finished

    def _sums(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums of values [N] over each sequence's rationale and over its answer."""
        sums = segment_sums(rows, self.layout.offsets).view(-1, self.layout.num_generations, 2)
        return sums[..., 0], sums[..., 1]

    @property
    def count(self) -> Tensor:
        """m, the number of sequences that count, [G, 1]."""
        return self.member.sum(1, keepdim=True).double()

    def answer_means(self, rows: Tensor, own_answer: Tensor) -> Tensor:
        """Return the mean of values [N] over each answer's own tokens, a bool [N]."""
        _, sums = self._sums(torch.where(own_answer, rows, 0))
        _, lengths = self._sums(own_answer.double())
        return sums / lengths.clamp(min=1)

    def floored(self, reward: Tensor) -> Tensor:
        """Return rewards with the group's lowest where the rationale is unfinished and floored."""
        return floored(reward, self._own_reward)

    def leave_one_out(self, reward: Tensor) -> Tensor:
        """Return each reward minus the mean of the others that count."""
        return leave_one_out(reward, self.member)

    def drop(self, groups: Tensor) -> None:
        """Leave out whole groups, by a bool [G, 1]."""
        self.member = self.member & ~groups

    def update(self, reward: Tensor, advantage: Tensor, answer_weight: Tensor) -> GroupAdvantage:
        """Return the coefficients, with the KL added; `reward` is logged, and A and w count."""
        beta, kl = self.settings.beta, self.settings.kl
        if kl != "k3" and beta != 0:
            penalty = self.floored(-beta * self.kl)
            reward = reward + penalty
            advantage = advantage + self.leave_one_out(penalty)

        segment = segment_of_rows(self.layout.offsets, self.logp.numel())
        scale = 1 / self.layout.num_averaged
        row_weight = torch.stack([advantage, answer_weight], -1).view(-1)[segment]
        is_rationale = segment % 2 == 0
        if kl == "k3" and beta != 0:
            row_weight = row_weight + torch.where(is_rationale, beta * self.drift.expm1(), 0)
        counts = self.member.reshape(-1)[segment // 2]
        coefficient = torch.where(counts, -scale * row_weight, 0)
        kl_coefficient = None
        if self.has_row_kl:
            nothing = torch.zeros_like(self.logp)
            kl_coefficient = torch.where(counts & is_rationale, beta * scale, nothing)

        def output(value: Tensor) -> Tensor:
            return value.reshape(-1).to(self.dtype)

        return GroupAdvantage(
            reward=output(reward),
            answer_logp=output(self.answer_logp),
            rationale_logp=output(self.rationale_logp),
            kl=output(self.kl),
            advantage=output(advantage),
            coefficient=output(coefficient),
            kl_coefficient=None if kl_coefficient is None else output(kl_coefficient),
        )


def latro(rows: Rows, settings: ObjectiveSettings) -> GroupAdvantage:
    """Maximise LaTRO's E_z[ℓ], by `latro_kernels.group_advantage` and nothing else.

        ∇J = 1/(NK) Σ_{n,k} [ (ℓ_k − mean_{j≠k} ℓ_j) ∇log π(z_k|x) + λ·∇ℓ_k ]

    "Language Models are Hidden Reasoners", arXiv 2411.04282, with λ = 1.

    Where rows are `unrewarded`, ℓ_k in the advantage is without them; in `answer_logp` and ∇ℓ_k
    they are. With ℓ'_k for the part that counts, the update then follows ∇E_z[ℓ'] through the
    rationales and λ·E_z[∇ℓ] through the answers.
    """
    logp = rows.logp.detach()
    if rows.unrewarded is not None:
        # The coefficients of answer rows do not depend on their log-probs; only the reward does.
        logp = torch.where(rows.unrewarded, 0, logp)
    out = group_advantage(
        logp,
        rows.ref_logp,
        rows.layout,
        beta=settings.beta,
        answer_weight=settings.answer_weight,
        kl=settings.kl,
        unfinished=settings.unfinished,
        row_kl=rows.row_kl,
        backend=settings.backend,
    )
    if rows.unrewarded is None:
        return out
    whole = segment_sums(rows.logp.detach().double(), rows.layout.offsets)[1::2]
    return replace(out, answer_logp=whole.to(out.answer_logp.dtype))


def verifree(rows: Rows, settings: ObjectiveSettings) -> GroupAdvantage:
    """Maximise VeriFree's E_z[π(y|x⊕z)], the chance that a sampled answer is y.

        ∇J = 1/(NK) Σ_{n,k} [ (R_k − mean_{j≠k} R_j) ∇log π(z_k|x) + λ·R_k·∇ℓ_k ],   R_k = e^ℓ_k

    The second term is λ·∇R_k and has no baseline. "Reinforcing General Reasoning without
    Verifiers", arXiv 2505.21493, with λ = 1 and no KL. Where no rationale makes the answer likely
    (ℓ below about −20) there is next to no gradient: the method is meant for short answers.
    """
    groups = _Groups(rows, settings)
    likelihood = groups.answer_logp.exp()
    reward = groups.floored(likelihood)
    return groups.update(reward, groups.leave_one_out(reward), settings.answer_weight * likelihood)


def jepo(rows: Rows, settings: ObjectiveSettings) -> GroupAdvantage:
    """Maximise JEPO's E_{z_1…z_m}[log mean_k π(y|x⊕z_k)], a bound on log π(y|x) above LaTRO's.

        L = log mean_j e^ℓ_j,   L_{−k} = log mean_{j≠k} e^ℓ_j
        ∇J = 1/N Σ_{n,k} [ (L − L_{−k}) ∇log π(z_k|x) + λ·softmax_k(ℓ)·∇ℓ_k ]

    The bound is a prompt's and not a sequence's, hence 1/N where LaTRO has 1/(NK): A and w are m
    times what stands here, and are LaTRO's where the ℓ of a group are nearly equal. The second term
    is λ·∇L. Exponentials are taken from the largest ℓ each sum has, so ℓ of −1000 lose nothing.
    "Beyond Verifiable Rewards: Scaling Reinforcement Learning for Language Models to Unverifiable
    Data", arXiv 2503.19618, the multi-sample bound with its leave-one-out control variate, with
    λ = 1. `reward` is ℓ.
    """
    groups = _Groups(rows, settings)
    reward = groups.floored(groups.answer_logp)
    member = groups.member
    peak, log_mean = _log_mean_exp(reward, member)
    others = member[:, None] & ~torch.eye(member.shape[1], dtype=torch.bool, device=member.device)
    others_peak, others_log_mean = _log_mean_exp(reward[:, None].expand(others.shape), others)
    # Peaks apart: where all ℓ are equal, both differences are 0 to the bit.
    gain = (peak[:, None] - others_peak) + (log_mean[:, None] - others_log_mean)
    counts = member & (groups.count > 1)
    advantage = torch.where(counts, groups.count * gain, 0)
    share = torch.where(member, groups.answer_logp, -math.inf).softmax(1)
    return groups.update(reward, advantage, settings.answer_weight * groups.count * share)


def rlpr(rows: Rows, settings: ObjectiveSettings) -> GroupAdvantage:
    """Maximise RLPR's mean probability of the answer's own tokens, less that without a rationale.

        R_k = clip(mean_t p(y_t|x⊕z_k) − mean_t p(y_t|x), 0, 1)
        ∇J  = 1/(NK) Σ_{n,k} (R_k − mean_j R_j)/std_j R_j · ∇log π(z_k|x)

    where t runs over the tokens that hold a character of the known answer, and not over those of
    the answer template or the end token, which are the same in all answers and nearly certain. The
    two means may run over different numbers of tokens, where an answer tokenizes otherwise in
    another context. With std over m − 1, so that p(y|x) matters through the clip alone. "RLPR:
    Extrapolating RLVR to General Domains without Verifiers", arXiv 2506.18254: its advantages are
    GRPO's, normalised by the group's spread, and it has no likelihood gradient on the given answer,
    so answer rows have coefficient 0 and λ no meaning.

    A group whose std is at most `rlpr_min_std` is dropped: all its rows have coefficient 0, its
    share of the KL too, and the mean over num_groups still counts it. The paper moves the threshold
    along a running mean of past stds; here it is constant. The paper's ratio clipping does nothing
    at one update a batch, and p(y|x) is the current policy's. The published code takes the mean of
    the loss over all tokens of a batch, so that a token weighs less the more tokens there are; here
    a sequence's gradient is that of its whole log π(z|x), and the mean is over sequences, as in the
    other objectives.

    Raises:
        ValueError: no own_answer, or no plain_logp.
    """
    if rows.own_answer is None:
        raise ValueError("own_answer: expected a tensor for rlpr, got None")
    if rows.plain_logp is None or rows.plain_offsets is None:
        raise ValueError("plain_logp: expected a tensor for rlpr, got None")
    groups = _Groups(rows, settings)
    plain = rows.plain_logp.detach().double().exp()
    lengths = rows.plain_offsets.diff().clamp(min=1)
    without = (segment_sums(plain, rows.plain_offsets) / lengths)[:, None]
    gain = groups.answer_means(groups.logp.exp(), rows.own_answer) - without
    reward = groups.floored(gain.clamp(0, 1))
    m = groups.count
    deviation = groups.leave_one_out(reward) * (m - 1) / m.clamp(min=1)
    spread = (deviation.square().sum(1, keepdim=True) / (m - 1).clamp(min=1)).sqrt()
    # So phrased that NaN is not dropped, but seen.
    dropped = spread <= settings.rlpr_min_std
    groups.drop(dropped)
    advantage = torch.where(dropped, 0, deviation / spread)
    return groups.update(reward, advantage, torch.zeros_like(reward))


def sft(rows: Rows, settings: ObjectiveSettings) -> GroupAdvantage:
    """Maximise the answers' likelihood after the model's own rationales, which earn nothing.

        ∇J = 1/(NK) Σ_{n,k} λ·∇ℓ_k

    LaTRO (arXiv 2411.04282) without its policy gradient: a baseline that tells what rewarding
    rationales adds. Rationale rows keep the KL's coefficients where β is not 0; `reward` is that of
    the rationales, 0 less the KL.
    """
    groups = _Groups(rows, settings)
    nothing = torch.zeros_like(groups.answer_logp)
    return groups.update(nothing, nothing, torch.full_like(nothing, settings.answer_weight))


OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {"latro": latro, "verifree": verifree, "jepo": jepo, "rlpr": rlpr, "sft": sft}
)
PLAIN_OBJECTIVES = frozenset({"rlpr"})
"""Those that read `Rows.plain_logp`."""


def _log_mean_exp(logs: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
    """Return peak and log mean exp(logs − peak) over the members along the last dimension."""
    peak = torch.where(member, logs, -math.inf).amax(-1, keepdim=True)
    total = torch.where(member, (logs - peak).exp(), 0).sum(-1)
    return peak.squeeze(-1), (total / member.sum(-1)).log()
