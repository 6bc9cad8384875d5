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

What the loss follows, in expectation over the sequences, with λ = 1 and all finished: "reward" and
"exact" both the gradient of

    E_z[log π(y|x⊕z)] − β·KL(π(z|x) ‖ π_0(z|x))

the KL being that of whole sequences. ∇KL = E[Σ_t ∇row_kl_t + Σ_s ∇logp_s·Σ_{t>s} row_kl_t]: a
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

from dataclasses import dataclass

import torch
from torch import Tensor

from latro_kernels import native
from latro_kernels.checks import check_choice, check_count, check_number, check_same, check_vector
from latro_kernels.dispatch import resolve
from latro_kernels.groups import floored, leave_one_out, segment_of_rows, segment_sums

KL_FORMS = ("reward", "k3", "exact")
UNFINISHED_RULES = ("floor", "exclude")
_OUTPUTS = ("reward", "answer_logp", "rationale_logp", "kl", "advantage", "coefficient")


@dataclass(frozen=True, eq=False)
class GroupLayout:
    """Which row of a packed batch is what.

    The rows of a sequence are contiguous, its rationale first, then its answer; the K sequences of
    a prompt are consecutive. S = G·K sequences make N rows.

    Args:
        offsets: int64 [2·S + 1], ascending, from 0 to N. Rows offsets[2s]:offsets[2s + 1] are the
            rationale of sequence s, rows offsets[2s + 1]:offsets[2s + 2] its answer.
        num_generations: K, at least 2.
        finished: bool [S], on the device of `offsets`; False where the rationale hit the length
            limit. None: all are finished.
        num_groups: the prompts of the whole update, over which coefficients are averaged; more than
            G where an update goes through in several batches. None: G.

    Raises:
        TypeError: a field of the wrong type or dtype.
        ValueError: a field of the wrong shape, device or range. The values of `offsets` are not
            read, as that would wait for the device: `check` does.
    """

    offsets: Tensor
    num_generations: int
    finished: Tensor | None = None
    num_groups: int | None = None

    def __post_init__(self) -> None:
        check_vector("offsets", self.offsets, torch.int64)
        if self.offsets.numel() % 2 == 0:
            raise ValueError(
                f"offsets: expected two segments a sequence, 2·S + 1 entries, "
                f"got {self.offsets.numel()}"
            )
        check_count("num_generations", self.num_generations, 2)
        if self.num_sequences % self.num_generations:
            raise ValueError(
                f"offsets: expected whole groups of num_generations={self.num_generations} "
                f"sequences, got {self.num_sequences} sequences"
            )
        if self.finished is not None:
            check_vector("finished", self.finished, torch.bool)
            check_same("finished", self.finished, (self.num_sequences,), self.offsets.device)
        if self.num_groups is not None:
            check_count("num_groups", self.num_groups, self.num_sequences // self.num_generations)

    @property
    def num_sequences(self) -> int:
        """S."""
        return self.offsets.numel() // 2

    def check(self, num_rows: int) -> None:
        """Check the values of `offsets` against N = `num_rows`; waits for the device they are on.

        Raises:
            ValueError: `offsets` is not ascending from 0 to `num_rows`, or an answer has no rows.
        """
        _check_offsets(self.offsets, num_rows)
        answers = self.offsets.diff()[1::2]
        if bool((answers == 0).any()):
            empty = int((answers == 0).nonzero()[0])
            raise ValueError(
                f"offsets: expected an answer of one row or more, got none for sequence {empty}"
            )


@dataclass(frozen=True, eq=False)
class GroupAdvantage:
    """What `group_advantage` returns: fp32, on the device of logp, without gradient.

    Args:
        reward: [S], nats; with unfinished="floor" that of an unfinished sequence is the floor.
        answer_logp: [S], nats: log π(y | x, z).
        rationale_logp: [S], nats: log π(z | x).
        kl: [S], nats: the estimate of KL(π ‖ π_0) that `kl` names; 0 without its input.
        advantage: [S], nats.
        coefficient: [N], of logp in the loss.
        kl_coefficient: [N], of row_kl in the loss; None where there is no row_kl.

    In expectation over the sequences the two coefficients together follow the gradient of the
    answers' log-likelihood less β times

        kl="reward", "exact"   KL(π ‖ π_0) of whole sequences
        kl="k3"                Σ_rows KL(π_0 ‖ π), with the tokens before each row held constant
    """

    reward: Tensor
    answer_logp: Tensor
    rationale_logp: Tensor
    kl: Tensor
    advantage: Tensor
    coefficient: Tensor
    kl_coefficient: Tensor | None


def reference(
    logp: Tensor,
    ref_logp: Tensor | None,
    layout: GroupLayout,
    *,
    beta: float = 0.05,
    answer_weight: float = 1.0,
    kl: str = "reward",
    unfinished: str = "floor",
    row_kl: Tensor | None = None,
) -> GroupAdvantage:
    """The formulas in plain PyTorch, in the dtype of logp, fp32 or fp64; no argument is checked."""
    S, K = layout.num_sequences, layout.num_generations
    segment = segment_of_rows(layout.offsets, logp.numel())
    sequence, is_answer = segment // 2, segment % 2 == 1

    def sequence_sums(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums over every rationale and over every answer, [S] each."""
        rationale, answer = segment_sums(rows, layout.offsets).view(S, 2).unbind(1)
        return rationale, answer

    zero = torch.zeros_like(logp)
    d = zero if ref_logp is None else ref_logp - logp
    rationale_logp, answer_logp = sequence_sums(logp)
    row_terms = d.expm1() - d if kl == "k3" else -d
    kl_sum, _ = sequence_sums(row_terms if row_kl is None else row_kl)
    # Without weight an infinite KL counts for nothing, and 0 · inf would make NaN of it.
    reward = answer_logp - (beta * kl_sum if kl != "k3" and beta != 0 else 0)

    reward = reward.view(-1, K)
    member = torch.ones_like(reward, dtype=torch.bool)
    if layout.finished is not None:
        finished = layout.finished.view(-1, K)
        if unfinished == "floor":
            reward = floored(reward, finished)
        else:
            member = finished
    advantage = leave_one_out(reward, member).view(-1)

    rationale = advantage[sequence] + (beta * d.expm1() if kl == "k3" and beta != 0 else zero)
    weight = torch.where(is_answer, answer_weight, rationale)
    scale = 1 / max(1, (layout.num_groups or S // K) * K)
    is_member = member.reshape(-1)[sequence]
    coefficient = torch.where(is_member, -weight * scale, 0)
    kl_coefficient = None
    if row_kl is not None:
        kl_coefficient = torch.where(is_member & ~is_answer, beta * scale, zero)
    return GroupAdvantage(
        reward=reward.reshape(-1),
        answer_logp=answer_logp,
        rationale_logp=rationale_logp,
        kl=kl_sum,
        advantage=advantage,
        coefficient=coefficient,
        kl_coefficient=kl_coefficient,
    )


torch.library.define(
    "latro_kernels::group_advantage",
    "(Tensor logp, Tensor? ref_logp, Tensor? row_kl, Tensor offsets, Tensor? finished, "
    "int num_generations, int num_groups, float beta, float answer_weight, str kl, "
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
    num_groups: int,
    beta: float,
    answer_weight: float,
    kl: str,
    unfinished: str,
    backend: str,
) -> tuple[Tensor, ...]:
    # Resolved here rather than in the public function, for torch.compile cannot trace the search
    # for a library.
    backend = resolve(backend, logp.device)
    if backend == "reference":
        layout = GroupLayout(offsets, num_generations, finished, num_groups)
        out = reference(
            logp.double(),
            None if ref_logp is None else ref_logp.double(),
            layout,
            beta=beta,
            answer_weight=answer_weight,
            kl=kl,
            unfinished=unfinished,
            row_kl=None if row_kl is None else row_kl.double(),
        )
        return tuple(getattr(out, name).to(logp.dtype) for name in _OUTPUTS)

    S = offsets.numel() // 2
    G = S // num_generations
    outputs = (*(logp.new_empty(S) for _ in range(5)), torch.empty_like(logp))
    tensors = (logp, ref_logp, row_kl, offsets, finished, *outputs)
    settings = (
        G,
        num_generations,
        1 / max(1, num_groups * num_generations),
        beta,
        answer_weight,
        kl == "k3",
        unfinished == "exclude",
    )
    if backend == "triton":
        from latro_kernels.triton import group_advantage as kernels

        kernels.launch(tensors, *settings)
        return outputs
    if backend == "cpu":
        # Free on this device, and a wrong offset would have the kernel read outside of logp.
        _check_offsets(offsets, logp.numel())
        rewards = torch.empty(S, dtype=torch.float64)
        threads = torch.get_num_threads()
        native.call("latro_cpu_group_advantage_forward", *tensors, rewards, *settings, threads)
    else:
        N, sizes = logp.numel(), native.constants()
        tiles = N // sizes["LATRO_GROUP_TILE_ROWS"] + 1
        words = S + tiles * sizes["LATRO_GROUP_TILE_WORDS"]
        scratch = torch.empty(words, dtype=torch.float64, device=logp.device)
        inputs = (*tensors, scratch, N, *settings)
        with torch.cuda.device(logp.device):
            stream = torch.cuda.current_stream().cuda_stream
            native.call("latro_cuda_group_advantage_forward", *inputs, stream)
    return outputs


@torch.library.register_fake("latro_kernels::group_advantage")
def _(
    logp: Tensor, ref_logp: Tensor | None, row_kl: Tensor | None, offsets: Tensor, *_: object
) -> tuple[Tensor, ...]:
    S = offsets.numel() // 2
    return (*(logp.new_empty(S) for _ in range(5)), logp.new_empty(logp.numel()))


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
    """Rewards, leave-one-out advantages and the coefficient of every row in the loss.

    With sequences of one rationale and one answer row, logp [G, K, 2] and no settings, this is

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
    check_same("layout.offsets", layout.offsets, layout.offsets.shape, logp.device)
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

    S, K = layout.num_sequences, layout.num_generations
    num_groups = S // K if layout.num_groups is None else layout.num_groups
    outputs = torch.ops.latro_kernels.group_advantage(
        logp.detach().contiguous(),
        None if ref_logp is None else ref_logp.detach().contiguous(),
        None if row_kl is None else row_kl.detach().contiguous(),
        layout.offsets.contiguous(),
        None if layout.finished is None else layout.finished.contiguous(),
        K,
        num_groups,
        float(beta),
        float(answer_weight),
        kl,
        unfinished,
        backend,
    )
    kl_coefficient = None
    if row_kl is not None:
        weight = beta / max(1, num_groups * K)
        kl_coefficient = _kl_coefficient(row_kl.detach(), layout, weight, unfinished)
    return GroupAdvantage(
        **dict(zip(_OUTPUTS, outputs, strict=True)), kl_coefficient=kl_coefficient
    )


def _kl_coefficient(row_kl: Tensor, layout: GroupLayout, weight: float, unfinished: str) -> Tensor:
    """`weight` on the rationale rows of the sequences that count, 0 elsewhere."""
    row = torch.arange(row_kl.numel(), device=row_kl.device)
    segment = torch.searchsorted(layout.offsets, row, right=True) - 1
    counts = segment % 2 == 0
    if unfinished == "exclude" and layout.finished is not None:
        counts &= layout.finished[segment // 2]
    return torch.where(counts, weight, torch.zeros_like(row_kl))


def _check_offsets(offsets: Tensor, num_rows: int) -> None:
    first, last = int(offsets[0]), int(offsets[-1])
    if (first, last) != (0, num_rows):
        raise ValueError(
            f"offsets: expected first 0 and last {num_rows}, the number of rows, "
            f"got {first} and {last}"
        )
    descents = (offsets.diff() < 0).nonzero()
    if len(descents):
        i = int(descents[0])
        raise ValueError(
            f"offsets: expected ascending values, got {int(offsets[i])} then "
            f"{int(offsets[i + 1])} at {i}"
        )
