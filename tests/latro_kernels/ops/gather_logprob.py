"""gather_logprob for the tests of all ops."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from latro_kernels import gather_logprob
from latro_kernels.gather_logprob import reference
from tests.latro_kernels.ops.op import COLUMNS, DTYPES, INTERPRETED, Op, Problem, Results

IGNORED = -100
# Those that have a gradient.
STATISTICS = ("entropy", "log_sum_exp", "log_sum_p_squared")


def problem(
    shape: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    *,
    rows: str = "random",
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    statistics: tuple[str, ...] = (),
    batch: bool = False,
    seed: int = 0,
    **options: Any,
) -> Problem:
    """Make a random problem of (N, V), or with `batch` of (N, 3, V) of which a third is ignored.

    `rows` is "random", "flat" (all logits nearly equal) or "peaked" (p of the target above 0.999,
    logits of the others random). With `entropy` the pair of log-probs and entropies is asked for.
    """
    N, V = shape
    leading = (N, 3) if batch else (N,)
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(*leading, V, generator=random) * (1e-3 if rows == "flat" else 2.0)
    target = torch.randint(V, leading, generator=random)
    if rows == "peaked":
        logits.scatter_(-1, target[..., None], 20.0 * max(1.0, temperature))
    names = ("logp", "entropy") if entropy else ("logp", *statistics)
    upstream = {name: torch.randn(leading, generator=random) for name in names}
    return Problem(
        op=OP,
        arguments={
            "logits": logits.to(dtype),
            "target": ignoring_some(target) if batch else target,
            "temperature": temperature,
            "softcap": softcap,
            "ignore_index": IGNORED if batch else None,
        },
        upstream=upstream,
        trained=("logits",),
        options={"return_entropy": entropy, "statistics": statistics or None} | options,
    )


def first_dimension(N: int, batch: bool) -> int:
    """Return the first dimension of N rows, of which a batch has three in each entry."""
    return -(-N // 3) if batch else N


def ignoring_some(target: Tensor) -> Tensor:
    """Ignore a third of the targets."""
    number = torch.arange(target.numel()).view(target.shape)
    return target.masked_fill(number % 3 == 1, IGNORED)


def unfused(
    logits: Tensor,
    target: Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int | None,
) -> tuple[Tensor, ...]:
    """Return log-prob and `STATISTICS` in fp32, from logits in the model's dtype."""
    if ignore_index is not None:
        kept = target != ignore_index
        of_kept = unfused(logits[kept], target[kept], temperature, softcap, None)
        return tuple(torch.zeros(target.shape).to(x).masked_scatter(kept, x) for x in of_kept)
    z = logits.float()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    log_p = torch.log_softmax(z, -1)
    logp = log_p.gather(-1, target[..., None]).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return logp, entropy, torch.logsumexp(z, -1), torch.logsumexp(2 * log_p, -1)


def formula(
    logits: Tensor,
    target: Tensor,
    temperature: float,
    softcap: float,
    ignore_index: None = None,
) -> Results:
    """Log-prob and entropy from `torch.distributions`, the others as they are written."""
    z = softcap * torch.tanh(logits / softcap) / temperature
    given = torch.distributions.Categorical(logits=z)
    return {
        "logp": given.log_prob(target),
        "entropy": given.entropy(),
        "log_sum_exp": z.exp().sum(-1).log(),
        "is_top1": z.argmax(-1) == target,
        "log_sum_p_squared": given.probs.square().sum(-1).log(),
        "mean_logit": z.sum(-1) / z.shape[-1],
    }


def strided(given: Problem) -> list[Problem]:
    """Rows that lie apart and begin anywhere, columns that lie apart, a target with a stride."""
    logits, target = given["logits"], given["target"]
    N, V = logits.shape
    target = torch.stack([target, target], 1)[:, 0]
    wide = [logits.new_zeros(N, V + 69)[:, first : first + V].copy_(logits) for first in (0, 1, 3)]
    return [given.but(logits=x, target=target) for x in (*wide, logits.t().contiguous().t())]


def _samples() -> list[tuple[tuple[int, int], torch.dtype, dict[str, Any]]]:
    plain: list[dict[str, Any]] = [
        {},
        {"entropy": True},
        {"temperature": 0.7, "softcap": 5.0},
        {"temperature": 0.7, "statistics": ("log_sum_exp",)},
        {"temperature": 1.3, "softcap": 30.0, "statistics": STATISTICS},
    ]
    extremes = [
        {"rows": rows, "statistics": statistics}
        for rows in ("peaked", "flat")
        for statistics in ((), STATISTICS)
    ]
    if INTERPRETED:
        return [
            ((0, 30), torch.float32, {"entropy": True}),
            ((1, 1), torch.float32, {"softcap": 5.0, "entropy": True}),
            (
                (5, 70),
                torch.float32,
                {"softcap": 5.0, "temperature": 0.7, "statistics": STATISTICS},
            ),
            ((10, 70), torch.float32, {}),
            ((4, 70), torch.float32, {"batch": True, "entropy": True}),
            ((4, 101), torch.float16, {"batch": True, "statistics": ("log_sum_exp",)}),
            ((5, 70), torch.bfloat16, {"softcap": 30.0}),
            ((5, 70), torch.float16, {"entropy": True}),
            ((6, 70), torch.float32, {"rows": "peaked", "statistics": STATISTICS}),
            ((6, 101), torch.bfloat16, {"rows": "peaked"}),
            ((6, 70), torch.float32, {"rows": "flat", "statistics": STATISTICS}),
        ]
    # N, V: none; one of everything; a prime V; more than a block of any backend's, in odd numbers.
    shapes = [(0, 30), (1, 1), (7, 101), (1, 64), (33, 1031), (5, 9001)]
    batched: list[dict[str, Any]] = [{"batch": True, **options} for options in plain[-2:]]
    return [
        *product(shapes, DTYPES, plain),
        *product([(40, 1031)], DTYPES, extremes),
        *product([(0, 30), (33, 1031)], DTYPES, batched),
    ]


def _of_rows(
    N: int, dtype: torch.dtype = torch.float32, *, batch: bool = False, **form: Any
) -> Problem:
    return problem((first_dimension(N, batch), COLUMNS), dtype, batch=batch, **form)


BAD = [
    ({"logits": [1.0]}, TypeError, "logits: expected a tensor, got list"),
    ({"logits": torch.tensor(1.0)}, ValueError, r"logits: expected 1 dimension or more, got shape"),
    ({"logits": torch.zeros(5)}, ValueError, r"target: expected shape \(\), as logits has rows"),
    ({"logits": torch.zeros(4, 0)}, ValueError, r"logits: expected shape \[\.\.\., V\] with V > 0"),
    ({"logits": torch.zeros(1, 4, 5)}, ValueError, r"target: expected shape \(1, 4\), as logits"),
    ({"logits": torch.zeros(4, 5).int()}, TypeError, "logits: expected dtype .*torch.int32"),
    ({"logits": torch.zeros(4, 5).double()}, TypeError, "logits: expected dtype torch.float32"),
    ({"target": 3}, TypeError, "target: expected a tensor, got int"),
    (
        {"target": torch.zeros(4, device="meta").long()},
        ValueError,
        "target: expected the device of logits, cpu, got meta",
    ),
    ({"inplace_backward": 1}, TypeError, "inplace_backward: expected a bool, got int"),
    (
        {"inplace_backward": True, "backend": "reference"},
        ValueError,
        "inplace_backward: expected False with backend='reference'",
    ),
    (
        {"inplace_backward": True, "logits": torch.zeros(5).expand(4, 5)},
        ValueError,
        r"logits: expected rows that do not overlap.*got strides \(0, 1\)",
    ),
]
OP = Op(
    name="gather_logprob",
    function=gather_logprob,
    reference=reference,
    unfused=unfused,
    formula=formula,
    outputs=("logp", *STATISTICS),
    gradients={"logits": "dlogits"},
    rows=("logits", "target"),
    columns={"logits": -1},
    of_rows=_of_rows,
    problem=problem,
    uneven=[(50, 2051)],
    samples=_samples(),
    draws=st.builds(
        problem,
        st.tuples(st.integers(0, 40), st.integers(1, 3000)),
        statistics=st.sampled_from([(), *((name,) for name in STATISTICS), STATISTICS]),
        softcap=st.sampled_from([None, 2.0, 50.0]),
        batch=st.booleans(),
        seed=st.integers(0, 1000),
    ),
    forms={
        "plain": {"statistics": STATISTICS},
        "in place": {"inplace_backward": True},
        "batched": {"batch": True, "entropy": True},
        "batched, in place": {
            **{"batch": True, "inplace_backward": True, "statistics": ("log_sum_exp",)}
        },
    },
    strided=strided,
    good={"logits": torch.zeros(4, 5), "target": torch.zeros(4, dtype=torch.int64)},
    bad=BAD,
)
