"""linear_kl for the tests of all ops."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.nn.functional import kl_div, linear

from latro_kernels import linear_kl
from latro_kernels.linear_kl import reference
from tests.latro_kernels.ops.op import COLUMNS, DTYPES, HIDDEN, INTERPRETED, Op, Problem, Results

FP32, BF16, FP16 = DTYPES


GRADIENTS = {
    **{"hidden_p": "dx", "weight_p": "dw", "bias_p": "db"},
    **{"hidden_q": "dx_q", "weight_q": "dw_q", "bias_q": "db_q"},
}


def problem(
    shape: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    *,
    hidden_size_q: int | None = None,
    rows: str = "random",
    apart: float | None = None,
    bias: bool = False,
    temperature: float | tuple[float, float] = 1.0,
    softcap: float | tuple[float | None, float | None] | None = None,
    scale: float = 1.0,
    seed: int = 0,
) -> Problem:
    """Make a random problem of (N, H, V), with `hidden_size_q` for q where it is another.

    `rows` is "random", "flat" (all logits nearly equal) or "peaked" (p and q above 0.999 at the
    same token). `apart` is how far q's hidden states and weight are from p's, relatively; None:
    they have nothing in common. `scale` is the size of the upstream gradients.
    """
    N, H, V = shape
    random = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random)

    def head(H: int, token: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        hidden = normal(N, H) * (1e-3 if rows == "flat" else 1.0)
        weight = normal(V, H) * (2.0 / H**0.5)
        if rows == "peaked":
            directions = weight[token]
            norm = directions.square().sum(1, keepdim=True)
            hidden = 0.1 * hidden + directions * (17.0 * max(1.0, temperature) / norm)
        return hidden, weight

    token = torch.randperm(V, generator=random)[:N] if rows == "peaked" else torch.empty(0)
    temperature_p, temperature_q = of_both(temperature)
    hidden_p, weight_p = head(H, token, temperature_p)
    hidden_q, weight_q = head(hidden_size_q or H, token, temperature_q)
    if apart is not None:
        hidden_q, weight_q = hidden_p + apart * hidden_q, weight_p + apart * weight_q
    tensors = {
        "hidden_p": hidden_p,
        "weight_p": weight_p,
        "hidden_q": hidden_q,
        "weight_q": weight_q,
        "bias_p": normal(V) if bias else None,
        "bias_q": normal(V) if bias else None,
    }
    tensors = {name: None if t is None else t.to(dtype) for name, t in tensors.items()}
    return _of(tensors | {"temperature": temperature, "softcap": softcap}, scale * normal(N))


def _of(arguments: dict[str, Any], grad_kl: Tensor) -> Problem:
    return Problem(op=OP, arguments=arguments, upstream={"kl": grad_kl}, trained=tuple(GRADIENTS))


def of_logits(zp: Tensor, zq: Tensor, grad_kl: Tensor) -> Problem:
    """Make the problem whose heads have these logits [N, V], by weights that are the identity."""
    identity = torch.eye(zp.shape[1])
    arguments = {"hidden_p": zp, "weight_p": identity, "hidden_q": zq, "weight_q": identity.clone()}
    settings = {"bias_p": None, "bias_q": None, "temperature": 1.0, "softcap": None}
    return _of(arguments | settings, grad_kl)


def nearly_one_hot(N: int, V: int, scale: float) -> Problem:
    """Make rows of which p has 1 − 10⁻⁶ to 1 − 10⁻¹² at one token, where log p/q is about 60."""
    random = torch.Generator().manual_seed(0)
    zp = 2 * torch.randn(N, V, generator=random)
    zq = 2 * torch.randn(N, V, generator=random)
    token = torch.randint(V, (N, 1), generator=random)
    zp.scatter_(1, token, 20 + 6 * torch.rand(N, 1, generator=random))
    zq.scatter_add_(1, token, -60 * torch.ones(N, 1))
    return of_logits(zp, zq, scale * torch.randn(N, generator=random))


def share_weight(given: Problem) -> Problem:
    """Give head q the very weight of p."""
    return given.but(weight_q=given["weight_p"])


def equal_heads(given: Problem) -> Problem:
    """Make head q a copy of p."""
    copies = {n: given[f"{n}_p"] for n in ("hidden", "weight", "bias")}
    return given.but(**{f"{n}_q": None if t is None else t.clone() for n, t in copies.items()})


def of_both(scale: Any) -> tuple[Any, Any]:
    """Return p's and q's temperature, or softcap, of one for both or a pair."""
    return scale if isinstance(scale, tuple) else (scale, scale)


def _of_both(log_softmax: Any, arguments: dict[str, Any]) -> tuple[Any, Any]:
    """Apply `log_softmax` to each head's hidden, weight, bias, temperature and softcap."""
    scales = zip(of_both(arguments["temperature"]), of_both(arguments["softcap"]), strict=True)
    p, q = ([arguments[f"{n}_{head}"] for n in ("hidden", "weight", "bias")] for head in "pq")
    return tuple(log_softmax(*head, *of) for head, of in zip((p, q), scales, strict=True))


def unfused(**arguments: Any) -> Tensor:
    """Logits in the model's dtype, the KL in fp32."""

    def log_softmax(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        temperature: float,
        softcap: float | None,
    ) -> Tensor:
        z = linear(hidden, weight, bias).float()
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        return torch.log_softmax(z / temperature, -1)

    log_p, log_q = _of_both(log_softmax, arguments)
    return kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def formula(**arguments: Any) -> Results:
    """Return the KL from `torch.distributions`."""

    def given(
        hidden: Tensor, weight: Tensor, bias: Tensor, temperature: float, softcap: float
    ) -> Categorical:
        logits = softcap * torch.tanh((hidden @ weight.T + bias) / softcap)
        return Categorical(logits=logits / temperature)

    return {"kl": kl_divergence(*_of_both(given, arguments))}


def strided(given: Problem) -> list[Problem]:
    """Rows and columns that lie apart, a transposed weight, one number as the whole bias."""
    apart = given.but(
        hidden_p=torch.stack([given["hidden_p"], given["hidden_p"]], 1)[:, 1],
        weight_p=given["weight_p"].t().contiguous().t(),
        hidden_q=given["hidden_q"].repeat_interleave(2, 1)[:, ::2],
        weight_q=given["weight_q"].repeat_interleave(2, 1)[:, ::2],
        bias_p=given["bias_p"].repeat_interleave(2)[::2],
        bias_q=given["bias_q"][:1].expand(len(given["bias_q"])),
    )
    assert not apart["weight_p"].is_contiguous()
    return [apart, share_weight(apart)]


def _samples() -> list[tuple[tuple[int, int, int], torch.dtype, dict[str, Any]]]:
    plain: list[dict[str, Any]] = [
        {},
        {"bias": True, "hidden_size_q": 130},
        {"temperature": 0.7, "softcap": 5.0},
        {"temperature": 1.3, "softcap": 30.0, "bias": True, "apart": 0.1},
        {"apart": 1e-3},
        {"temperature": (0.7, 2.0), "softcap": (None, 5.0), "bias": True},
        {"temperature": (2.0, 0.7), "softcap": (5.0, 30.0)},
    ]
    extremes = [
        {"rows": rows, "apart": apart} for rows in ("peaked", "flat") for apart in (None, 0.01)
    ]
    if INTERPRETED:
        return [
            ((0, 5, 30), FP32, {"bias": True}),
            ((1, 1, 1), FP32, {"bias": True}),
            ((5, 3, 70), FP32, {"softcap": 5.0, "temperature": 0.7}),
            ((10, 7, 70), FP32, {"hidden_size_q": 4}),
            ((5, 3, 70), FP32, {"temperature": (0.7, 2.0), "softcap": (None, 5.0)}),
            ((5, 3, 70), FP32, {"temperature": (2.0, 0.7), "softcap": (5.0, 30.0), "bias": True}),
            ((5, 3, 70), BF16, {"bias": True, "softcap": 30.0}),
            ((5, 3, 70), FP16, {}),
            ((6, 70, 70), FP32, {"rows": "peaked"}),
            ((6, 70, 70), BF16, {"rows": "peaked", "apart": 0.01}),
            ((6, 9, 70), FP32, {"rows": "flat"}),
            ((6, 9, 70), FP32, {"apart": 1e-3, "bias": True}),
            ((6, 9, 70), FP32, {"apart": 0.3}),
        ]
    # N, H, V: none; one of everything; odd; prime V; an H for which bf16 is multiplied as such.
    shapes = [(0, 5, 300), (1, 1, 1), (7, 3, 101), (1, 33, 64), (61, 17, 257), (61, 256, 1031)]
    # The gate's 1e-5 is little beside gradients of 100.
    large = [options | {"scale": 100.0} for options in plain]
    return [
        *product(shapes, DTYPES, plain),
        *product(shapes, [FP32], large),
        *product([(40, 256, 1031)], DTYPES, extremes),
    ]


GOOD = {
    "hidden_p": torch.zeros(4, 3),
    "weight_p": torch.zeros(5, 3),
    "hidden_q": torch.zeros(4, 2),
    "weight_q": torch.zeros(5, 2),
}
BAD = [
    ({"hidden_p": [1.0]}, TypeError, "hidden_p: expected a tensor, got list"),
    ({"weight_q": None}, TypeError, "weight_q: expected a tensor, got NoneType"),
    ({"hidden_p": torch.tensor(1.0)}, ValueError, "hidden_p: expected 1 dimension or more, got"),
    ({"hidden_q": torch.zeros(1, 4, 2)}, ValueError, r"hidden_q: .*\(4, 'Hq'\), .*got \(1, 4, 2\)"),
    ({"hidden_q": torch.zeros(3, 2)}, ValueError, r"hidden_q: .*\(4, 'Hq'\), as .*got \(3, 2\)"),
    ({"weight_p": torch.zeros(5, 2)}, ValueError, r"weight_p: expected shape \[V, H\].*H = 3"),
    ({"weight_p": torch.zeros(0, 3)}, ValueError, "weight_p: .*V > 0"),
    ({"weight_q": torch.zeros(6, 2)}, ValueError, r"weight_q: .*V = 5, as in weight_p.*\(6, 2"),
    ({"weight_q": torch.zeros(5, 3)}, ValueError, r"weight_q: .*H = 2 > 0, as in hidden_q"),
    ({"weight_q": torch.zeros(5, 2).half()}, TypeError, "weight_q: expected the dtype of hid"),
    ({"hidden_q": torch.zeros(4, 2, device="meta")}, ValueError, "hidden_q: expected the dev"),
    ({"hidden_p": torch.zeros(4, 3).int()}, TypeError, "hidden_p: .*got torch.int32"),
    ({"hidden_p": torch.zeros(4, 3).double()}, TypeError, "hidden_p: expected dtype"),
    ({"bias_p": torch.zeros(4)}, ValueError, r"bias_p: expected shape \(5,\).*got 4"),
    ({"bias_q": torch.zeros(5, 1)}, ValueError, "bias_q: expected 1 dimension, got"),
    ({"bias_q": torch.zeros(5).bfloat16()}, TypeError, "bias_q: expected the dtype of hidden"),
    ({"temperature": (1.0,)}, ValueError, r"temperature: expected one .*pair, .*got \(1.0,\)"),
    ({"softcap": [1.0, None, 2.0]}, ValueError, r"softcap: expected one .*got \[1.0, None, 2.0"),
    ({"temperature": (1.0, 0.0)}, ValueError, "temperature: expected a finite number.*got 0.0"),
    ({"temperature": (1.0, None)}, TypeError, "temperature: expected a float, got NoneType"),
    ({"softcap": (-1.0, None)}, ValueError, "softcap: expected a finite number.*got -1.0"),
    ({"temperature": (1.0, 1e30), "softcap": 1e-30}, ValueError, "softcap: .*temperature=1e"),
]
OP = Op(
    name="linear_kl",
    function=linear_kl,
    reference=reference,
    unfused=unfused,
    formula=formula,
    outputs=("kl",),
    gradients=GRADIENTS,
    rows=("hidden_p", "hidden_q"),
    columns={"weight_p": 0, "weight_q": 0, "bias_p": 0, "bias_q": 0},
    of_rows=lambda N, dtype=FP32, **form: problem((N, HIDDEN, COLUMNS), dtype, **form),
    problem=problem,
    uneven=[(150, 256, 1031)],
    samples=_samples(),
    draws=st.builds(
        problem,
        st.tuples(st.integers(0, 110), st.integers(1, 70), st.integers(1, 500)),
        hidden_size_q=st.integers(1, 70),
        bias=st.booleans(),
        temperature=st.sampled_from([1.0, (0.7, 1.5)]),
        softcap=st.sampled_from([None, 2.0, 50.0, (None, 3.0)]),
        scale=st.sampled_from([1.0, 100.0]),
        seed=st.integers(0, 1000),
    ),
    forms={
        "plain": {"bias": True},
        "two sizes": {"hidden_size_q": 5, "softcap": 3.0},
        "two scales": {"temperature": (0.7, 2.0), "softcap": (None, 3.0)},
    },
    strided=strided,
    good=GOOD,
    bad=BAD,
)
