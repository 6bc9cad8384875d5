"""linear_topk_logprob and linear_topk_kl, which have one backend for all devices."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.nn.functional import kl_div, linear

from latro_kernels import linear_topk_kl, linear_topk_logprob
from latro_kernels.linear_topk import reference, reference_kl
from tests.latro_kernels.ops.op import COLUMNS, DTYPES, HIDDEN, Op, Problem, Results

FP32, BF16, FP16 = DTYPES
GRADIENTS = {"hidden": "dx", "weight": "dw", "bias": "db"}


def problem(
    shape: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    *,
    k: int = 5,
    rows: str = "random",
    bias: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    seed: int = 0,
) -> Problem:
    """Make a random problem of `linear_topk_logprob` of (N, H, V), with at most V − 1 tokens a row.

    `rows` is "random", "flat" (all logits nearly equal) or "peaked" (above 0.999 at the first
    token). `scale` is the size of the upstream gradients.
    """
    N, H, V = shape
    random = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random)

    token = torch.rand(N, V, generator=random).argsort(-1)[:, : min(k, V - 1)].contiguous()
    hidden = normal(N, H) * (1e-3 if rows == "flat" else 1.0)
    weight = normal(V, H) * (2.0 / H**0.5)
    if rows == "peaked":
        directions = weight[token[:, 0]]
        norm = directions.square().sum(1, keepdim=True)
        hidden = 0.1 * hidden + directions * (17.0 * max(1.0, temperature) / norm)
    tensors = {"hidden": hidden, "weight": weight, "bias": normal(V) if bias else None}
    tensors = {name: None if t is None else t.to(dtype) for name, t in tensors.items()}
    settings = {"token": token, "temperature": temperature, "softcap": softcap}
    return Problem(
        op=OF_LOGPROB,
        arguments=tensors | settings,
        upstream={"log_prob": scale * normal(N, token.shape[-1] + 1)},
        trained=tuple(GRADIENTS),
    )


def kl_problem(*arguments: Any, teacher: str = "random", **options: Any) -> Problem:
    """Make the problem of `linear_topk_kl` of the same head and tokens.

    `teacher` is "random", or "peaked": its first token has all but some 10⁻⁵.
    """
    given = problem(*arguments, **options)
    upstream = given.upstream["log_prob"]
    logits = 2 * torch.randn(upstream.shape, generator=torch.Generator().manual_seed(1))
    if teacher == "peaked":
        logits[..., :1] += 14
    log_prob = logits.log_softmax(-1)[..., :-1]
    given = replace(given, op=OF_KL, upstream={"kl": upstream[..., 0].clone()})
    return given.but(log_prob=log_prob)


def unfused(
    hidden: Tensor,
    weight: Tensor,
    token: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> Tensor:
    """Logits in the model's dtype, log-probs in fp32."""
    z = linear(hidden, weight, bias).float()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    log_p = torch.log_softmax(z / temperature, -1)
    of_rest = log_p.scatter(-1, token, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_p.gather(-1, token), of_rest], -1)


def unfused_kl(log_prob: Tensor, **arguments: Any) -> Tensor:
    """Return the KL by the lines of the docstring."""
    p = log_prob.exp()
    p = torch.cat([p, (1 - p.sum(-1, keepdim=True)).clamp(min=0)], -1)
    return kl_div(unfused(**arguments), p, reduction="none").sum(-1)


def _buckets(
    hidden: Tensor,
    weight: Tensor,
    token: Tensor,
    bias: Tensor,
    temperature: float,
    softcap: float,
) -> Categorical:
    """Return the distribution over a row's tokens and the rest, from one over all tokens."""
    logits = softcap * torch.tanh((hidden @ weight.T + bias) / softcap)
    p = Categorical(logits=logits / temperature).probs
    of_tokens = p.gather(-1, token)
    rest = p.scatter(-1, token, 0).sum(-1, keepdim=True)
    return Categorical(probs=torch.cat([of_tokens, rest], -1))


def formula(**arguments: Any) -> Results:
    """Return the log-probs from `torch.distributions`."""
    return {"log_prob": _buckets(**arguments).logits}


def formula_kl(log_prob: Tensor, **arguments: Any) -> Results:
    """Return the KL from `torch.distributions`."""
    p = log_prob.exp()
    p = Categorical(probs=torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1))
    return {"kl": kl_divergence(p, _buckets(**arguments))}


def strided(given: Problem) -> list[Problem]:
    """Rows and columns that lie apart, a transposed weight, one number as the whole bias."""
    apart = {
        "hidden": given["hidden"].repeat_interleave(2, 1)[:, ::2],
        "weight": given["weight"].t().contiguous().t(),
        "bias": given["bias"][:1].expand(len(given["bias"])),
        "token": given["token"].t().contiguous().t(),
    }
    if given.op is OF_KL:
        apart["log_prob"] = given["log_prob"].repeat_interleave(2, 1)[:, ::2]
    return [given.but(**apart)]


def _samples() -> list[tuple[tuple[int, int, int], torch.dtype, dict[str, Any]]]:
    plain: list[dict[str, Any]] = [
        {},
        {"bias": True, "k": 1},
        {"temperature": 0.7, "softcap": 5.0},
        {"temperature": 1.3, "softcap": 30.0, "bias": True, "k": 40},
    ]
    # N, H, V: none; one of everything; odd; several blocks and slices.
    shapes = [(0, 5, 300), (1, 1, 2), (7, 3, 101), (61, 17, 257), (300, 40, 2500)]
    large = [options | {"scale": 100.0} for options in plain]
    extremes = [{"rows": rows} for rows in ("peaked", "flat")]
    return [
        *product(shapes, DTYPES, plain),
        *product(shapes[1:], [FP32], large),
        *product([(40, 256, 1031)], DTYPES, extremes),
    ]


GOOD = {
    "hidden": torch.zeros(4, 3),
    "weight": torch.zeros(5, 3),
    "token": torch.tensor([[0, 1], [1, 2], [4, -1], [3, 0]]),
}
BAD = [
    ({"hidden": [1.0]}, TypeError, "hidden: expected a tensor, got list"),
    ({"weight": torch.zeros(5, 2)}, ValueError, r"weight: expected shape \[V, H\].*H = 3"),
    ({"weight": torch.zeros(5, 3).half()}, TypeError, "weight: expected the dtype of hidden"),
    ({"hidden": torch.zeros(4, 3).double()}, TypeError, "hidden: expected dtype"),
    ({"bias": torch.zeros(4)}, ValueError, r"bias: expected shape \(5,\)"),
    ({"token": [[0]]}, TypeError, "token: expected a tensor, got list"),
    ({"token": torch.zeros(4, 2).int()}, TypeError, "token: expected dtype torch.int64, got"),
    ({"token": torch.zeros(4).long()}, ValueError, r"token: expected shape \(4, 'k'\).*\(4,\)"),
    ({"token": torch.zeros(3, 2).long()}, ValueError, r"token: expected shape .*got \(3, 2\)"),
    ({"token": torch.arange(5).expand(4, 5)}, ValueError, "token: .*fewer .* than V = 5.*got 5"),
    ({"token": torch.full((4, 2), 5)}, ValueError, r"token: .*in 0\.\.4, got 5 in row 0"),
    (
        {"token": torch.tensor([[0, 1], [0, 1], [0, -2], [0, 1]])},
        ValueError,
        r"token: .*in 0\.\.4, got -2 in row 2",
    ),
    (
        {"token": torch.full((4, 2), 5), "backend": "reference"},
        ValueError,
        r"token: .*in 0\.\.4, got 5 in row 0",
    ),
    ({"temperature": 0.0}, ValueError, "temperature: expected a finite number above 0"),
    ({"softcap": -1.0}, ValueError, "softcap: expected a finite number above 0"),
    ({"backend": "cpu"}, ValueError, "backend: expected one of 'auto', 'reference', got 'cpu'"),
    ({"backend": None}, TypeError, "backend: expected a str, got NoneType"),
]
BAD_KL = [
    ({"log_prob": [0.0]}, TypeError, "log_prob: expected a tensor, got list"),
    ({"log_prob": torch.zeros(4, 3)}, ValueError, r"log_prob: expected shape \(4, 2\), .*\(4, 3"),
    ({"log_prob": torch.zeros(4, 2).half()}, TypeError, "log_prob: expected dtype torch.float32"),
    ({"log_prob": torch.zeros(4, 2, device="meta")}, ValueError, "log_prob: expected the device"),
]
OF_LOGPROB = Op(
    name="linear_topk_logprob",
    function=linear_topk_logprob,
    reference=reference,
    unfused=unfused,
    formula=formula,
    outputs=("log_prob",),
    gradients=GRADIENTS,
    rows=("hidden", "token"),
    columns={"weight": 0, "bias": 0},
    of_rows=lambda N, dtype=FP32, **form: problem((N, HIDDEN, COLUMNS), dtype, **form),
    problem=problem,
    uneven=[(300, 40, 2500)],
    samples=_samples(),
    draws=st.builds(
        problem,
        st.tuples(st.integers(0, 110), st.integers(1, 70), st.integers(1, 500)),
        k=st.integers(0, 9),
        bias=st.booleans(),
        softcap=st.sampled_from([None, 2.0, 50.0]),
        scale=st.sampled_from([1.0, 100.0]),
        seed=st.integers(0, 1000),
    ),
    forms={"plain": {"bias": True}, "softcap": {"softcap": 3.0, "temperature": 0.7, "k": 1}},
    strided=strided,
    good=GOOD,
    bad=BAD,
)
OF_KL = replace(
    OF_LOGPROB,
    name="linear_topk_kl",
    function=linear_topk_kl,
    reference=reference_kl,
    unfused=unfused_kl,
    formula=formula_kl,
    outputs=("kl",),
    rows=("hidden", "token", "log_prob"),
    of_rows=lambda N, dtype=FP32, **form: kl_problem((N, HIDDEN, COLUMNS), dtype, **form),
    problem=kl_problem,
    samples=[
        *_samples(),
        *(((40, 256, 1031), FP32, {"rows": r, "teacher": "peaked"}) for r in ("random", "peaked")),
    ],
    draws=st.builds(
        kl_problem,
        st.tuples(st.integers(0, 110), st.integers(1, 70), st.integers(1, 500)),
        k=st.integers(0, 9),
        bias=st.booleans(),
        softcap=st.sampled_from([None, 2.0, 50.0]),
        scale=st.sampled_from([1.0, 100.0]),
        seed=st.integers(0, 1000),
    ),
    good=GOOD | {"log_prob": torch.full((4, 2), -1.0)},
    bad=[*BAD, *BAD_KL],
)
