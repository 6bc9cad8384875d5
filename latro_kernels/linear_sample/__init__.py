"""A token sampled at the LM head for each row, with its log-probability, without the logits.

With the logits z of `linear_logprob`, made of hidden states, weight, bias, temperature and softcap,

    z = c·tanh((x·Wᵀ + b) / c) / T

and independent standard Gumbel variates g_j, the token

    t = arg max_j (z_j + g_j)

has probability softmax(z)_t (Gumbel, "Statistical theory of extreme values", 1954; Maddison et al.,
"A* sampling", arXiv 1411.0030). A maximum can be taken as the columns come, like the running sums
of which log-prob and entropy are made, so that one pass over the weight does for all three:

    logp = z_t − log Σ_j exp(z_j)          entropy H = −Σ_j p_j·log p_j

FlashSampling, arXiv 2603.15854, shows this on GPUs for serving.

g_j is made of a 32-bit word that is a function of the row's seed, the row's position and the
column: `noise` says how. There is no state of a generator, and no other row, thread, block or rank
has a part in it. With v a uniform number of (0, 1) made of the word, e = −log(1 − v) is an
exponential variate and g = −log e: the token is the column that comes first in a race, with rates
exp(z_j). Near v = 0, where winners are, a float has digits to spare.

With each rank of a process group holding a slice of the vocabulary, ranks exchange what those of
`linear_logprob` do, and the highest score and its column.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from latro_kernels.checks import (
    as_float,
    check_device,
    check_group,
    check_head,
    check_scales,
    check_tensor,
    check_type,
    check_vector,
)
from latro_kernels.head import cast, reference_logits
from latro_kernels.linear_logprob import vocab_parallel
from latro_kernels.linear_sample import noise, ops


class LinearSample(NamedTuple):
    """What `linear_sample` returns.

    Args:
        token: [N] int64, in 0..V − 1.
        logp: [N] fp32, the token's log-probability, nats.
        entropy: [N] fp32, the entropy of the distribution that the token was drawn from, nats.
    """

    token: Tensor
    logp: Tensor
    entropy: Tensor


def reference(
    hidden: Tensor,
    weight: Tensor,
    seed: Tensor,
    position: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> LinearSample:
    """Return tokens, logp and entropy by plain PyTorch, in fp32 or fp64, without any checks."""
    z = score = reference_logits(hidden, weight, bias, softcap)
    if temperature > 0:
        z = z / temperature
        score = z + noise.gumbel(noise.words(seed, position, len(weight)), z.dtype)
    log_p = torch.log_softmax(z, dim=-1)
    # The first of several maxima. Where there is no distribution, log-probs are NaN.
    token = score.argmax(-1).masked_fill(log_p.isnan().any(-1), 0)
    # Where p is 0, p·log p has the limit 0; 0 · −inf would make it NaN.
    terms = log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)
    return LinearSample(token, log_p.gather(1, token[:, None]).squeeze(1), -terms.sum(-1))


@torch.no_grad()
def linear_sample(
    hidden: Tensor,
    weight: Tensor,
    seed: Tensor,
    position: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
    group: ProcessGroup | None = None,
) -> LinearSample:
    """Sample a token of each row at the LM head, with its log-prob and the entropy, without logits.

    Without softcap, and but for the source of random numbers, this is

        logits = torch.nn.functional.linear(hidden, weight, bias).float() / temperature
        policy = torch.distributions.Categorical(logits=logits)
        token = policy.sample()
        logp, entropy = policy.log_prob(token), policy.entropy()

    in one pass over the weight, and with no tensor of N·V. logp and entropy are those of
    `linear_logprob` for these tokens, to the bit on one backend: where a sample is scored on the
    same hidden states, its importance ratio is exactly 1.

    A row's token depends on its own hidden state, seed and position alone: on the CPU, and in
    Triton in bf16 and fp16, it is the same whatever other rows stand beside it, and on any number
    of threads, blocks or ranks. Backends make the same noise, so that their tokens differ only
    where two columns' scores are as close as their rounding. Pairs of a seed and a position that
    differ have independent noise; give a sequence its seed, and each of its tokens a position.

    Samples are the policy's own distribution: there is no top-k and no top-p. Either would need a
    second pass, and the log-prob would no longer be that of `linear_logprob`.

    Nothing here is differentiable, and results require no grad. Log-probs with a gradient come from
    `linear_logprob`.

    A column whose logit is −∞ is never drawn. A row whose logits hold NaN or +∞, or nothing but −∞,
    has token 0 and a logp of NaN.

    Args:
        hidden: [N, H] fp32, bf16 or fp16 (backend="reference": fp64 too); any strides.
        weight: [V, H], dtype and device of hidden; any strides.
        seed: [N] int64, any value.
        position: [N] int64, any value.
        bias: [V], dtype and device of hidden; None for none.
        temperature: divides the logits; above 0, and in fp32's normal range. 0: the token is the
            arg max of the logits, the lowest column of several, and logp and entropy are those of
            temperature 1.
        softcap: c of c·tanh(logits / c), before the temperature; None for none. c and
            c / temperature must also be above 0 and in fp32's normal range.
        backend: "auto", "reference" (makes all logits and their noise), "cpu", "triton" or "cuda".
        group: the ranks that hold the vocabulary between them, `weight` and `bias` being this
            rank's slice, in the order of ranks; slices may differ in size. Every rank passes the
            same hidden, seed and position, and gets the same result: the tokens, numbered over the
            whole vocabulary, that one rank with all of the weight would draw.

    Returns:
        token [N] int64, logp [N] and entropy [N], fp32, nats.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or value, or an unknown backend.
        BackendUnavailableError: the backend cannot run here.
    """
    _check(hidden, weight, seed, position, bias, backend, group)
    temperature = as_float("temperature", temperature)
    greedy = temperature == 0
    check_scales(1.0 if greedy else temperature, softcap)
    hidden, weight, bias = cast(hidden, weight, bias, backend)
    if backend == "reference":
        return reference(hidden, weight, seed, position, bias, temperature, softcap)
    first_column = None if group is None else vocab_parallel.place(weight, group)[0]
    token, score, *state = ops.sample(
        hidden=hidden,
        weight=weight,
        seed=seed,
        position=position,
        bias=bias,
        temperature=1.0 if greedy else temperature,
        softcap=float(softcap or 0.0),
        backend=backend,
        greedy=greedy,
        first_column=first_column,
    )
    token_logit, row_max, sum_exp, weighted_sum = state
    if group is not None:
        winner = _winner(token, score, group)
        token_logit = token_logit.masked_fill(token != winner, -torch.inf)
        token, state = winner, [row_max, sum_exp, token_logit, weighted_sum]
        row_max, sum_exp, token_logit, weighted_sum = vocab_parallel.merge(state, group)
    log_sum = sum_exp.log()
    logp = (token_logit - row_max) - log_sum
    return LinearSample(
        token=token.masked_fill(logp.isnan(), 0),
        logp=logp,
        entropy=log_sum - weighted_sum / sum_exp,
    )


def _winner(token: Tensor, score: Tensor, group: ProcessGroup) -> Tensor:
    """Return the column of the highest score of all ranks, the lowest of several."""
    highest = score.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    winner = token.masked_fill(score != highest, torch.iinfo(torch.int64).max)
    dist.all_reduce(winner, dist.ReduceOp.MIN, group=group)
    return winner


def _check(
    hidden: Tensor,
    weight: Tensor,
    seed: Tensor,
    position: Tensor,
    bias: Tensor | None,
    backend: object,
    group: object,
) -> None:
    """Raise for a wrong type, shape or device."""
    check_tensor("hidden", hidden, 2)
    check_head(hidden, weight, bias)
    for name, value in (("seed", seed), ("position", position)):
        check_vector(name, value, torch.int64)
        check_device(name, value, "hidden", hidden)
        if value.shape[0] != hidden.shape[0]:
            raise ValueError(
                f"{name}: expected shape ({hidden.shape[0]},), as hidden has rows, "
                f"got {value.shape[0]}"
            )
    check_type("backend", backend, str)
    check_group(group, backend)
