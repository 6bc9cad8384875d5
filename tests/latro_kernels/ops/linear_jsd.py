"""linear_jsd, which has one backend for all devices; its problems are those of linear_kl."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.nn.functional import kl_div, linear

from latro_kernels import linear_jsd
from latro_kernels.linear_jsd import reference
from tests.latro_kernels.ops import linear_kl
from tests.latro_kernels.ops.linear_kl import of_both
from tests.latro_kernels.ops.op import COLUMNS, DTYPES, HIDDEN, Problem, Results

FP32 = DTYPES[0]


def problem(*arguments: Any, beta: float = 0.5, **options: Any) -> Problem:
    """Make the problem of two heads that `linear_kl` has for these arguments."""
    given = linear_kl.problem(*arguments, **options)
    return replace(given, op=OP, upstream={"jsd": given.upstream["kl"]}).but(beta=beta)


def unfused(
    beta: float,
    hidden_p: Tensor,
    weight_p: Tensor,
    hidden_q: Tensor,
    weight_q: Tensor,
    bias_p: Tensor | None,
    bias_q: Tensor | None,
    temperature: Any,
    softcap: Any,
) -> Tensor:
    """Logits in the model's dtype, all else in fp32, as GKD's trainer in TRL has it."""
    log_probs = []
    heads = (hidden_p, weight_p, bias_p), (hidden_q, weight_q, bias_q)
    scales = zip(of_both(temperature), of_both(softcap), strict=True)
    for head, (of_temperature, of_softcap) in zip(heads, scales, strict=True):
        z = linear(*head).float()
        if of_softcap is not None:
            z = of_softcap * torch.tanh(z / of_softcap)
        log_probs.append(torch.log_softmax(z / of_temperature, -1))
    log_p, log_q = log_probs
    part = torch.tensor(beta, device=log_p.device)
    log_m = torch.stack([log_p + part.log(), log_q + torch.log1p(-part)]).logsumexp(0)
    of_p, of_q = (
        kl_div(log_m, log_prob, reduction="none", log_target=True) for log_prob in log_probs
    )
    return (beta * of_p + (1 - beta) * of_q).sum(-1)


def formula(
    beta: float,
    hidden_p: Tensor,
    weight_p: Tensor,
    hidden_q: Tensor,
    weight_q: Tensor,
    bias_p: Tensor,
    bias_q: Tensor,
    temperature: float,
    softcap: float,
) -> Results:
    """Return the divergence from `torch.distributions`."""

    def head(hidden: Tensor, weight: Tensor, bias: Tensor) -> Categorical:
        logits = softcap * torch.tanh((hidden @ weight.T + bias) / softcap)
        return Categorical(logits=logits / temperature)

    p, q = head(hidden_p, weight_p, bias_p), head(hidden_q, weight_q, bias_q)
    m = Categorical(probs=beta * p.probs + (1 - beta) * q.probs)
    return {"jsd": beta * kl_divergence(p, m) + (1 - beta) * kl_divergence(q, m)}


OP = replace(
    linear_kl.OP,
    name="linear_jsd",
    function=linear_jsd,
    reference=reference,
    unfused=unfused,
    formula=formula,
    outputs=("jsd",),
    of_rows=lambda N, dtype=FP32, **form: problem((N, HIDDEN, COLUMNS), dtype, **form),
    problem=problem,
    samples=[
        (shape, dtype, options | {"beta": (0.5, 0.1, 0.9)[i % 3]})
        for i, (shape, dtype, options) in enumerate(linear_kl.OP.samples)
        # The few roundings of one row's small gradient are too much a matter of chance.
        if shape[0] != 1 or "apart" not in options
    ],
    draws=st.builds(
        problem,
        # Of few numbers the roundings are a matter of chance: plain torch has none of some rows.
        st.tuples(st.integers(8, 110), st.integers(8, 70), st.integers(1, 500)),
        beta=st.sampled_from([0.5, 0.01, 0.7]),
        hidden_size_q=st.integers(8, 70),
        bias=st.booleans(),
        temperature=st.sampled_from([1.0, (0.7, 1.5)]),
        softcap=st.sampled_from([None, 2.0, 50.0, (None, 3.0)]),
        scale=st.sampled_from([1.0, 100.0]),
        seed=st.integers(0, 1000),
    ),
    strided=lambda given: linear_kl.strided(given)[:1],
    bad=[
        *linear_kl.OP.bad,
        ({"backend": "cpu"}, ValueError, "backend: expected one of 'auto', 'reference', got 'cpu'"),
        ({"backend": None}, TypeError, "backend: expected a str, got NoneType"),
        ({"beta": 0.0}, ValueError, "beta: expected a number above 0 and below 1, got 0.0"),
        ({"beta": 1}, ValueError, "beta: expected a number above 0 and below 1, got 1"),
        ({"beta": "0.5"}, TypeError, "beta: expected a float, got str"),
        ({"beta": float("nan")}, ValueError, "beta: expected a finite number, got nan"),
    ],
)
