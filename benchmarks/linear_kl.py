"""The exact KL of two heads over the vocabulary, and back: `linear_kl` beside plain PyTorch.

Beside it their Jensen-Shannon divergence, `linear_jsd`, and the KL from the 20 likeliest tokens of
one of the two, `linear_topk_kl`.

    python benchmarks/linear_kl.py --out benchmarks/results/ops

`common.ops` says what the columns hold; ops.json in --out has all numbers, with those of the other
ops.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from benchmarks.common.ops import BACKENDS, Op, Sizes, differentiated, run
from benchmarks.common.problem import DTYPES
from latro_kernels import linear_jsd, linear_kl, linear_topk_kl


def plain(
    hidden_p: Tensor, hidden_q: Tensor, weight: Tensor, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    at = weight.to(hidden_p.dtype).t()
    log_p, log_q = (
        torch.log_softmax((h.to(hidden_p.dtype) @ at).to(out_dtype), -1)
        for h in (hidden_p, hidden_q)
    )
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def fused(hidden_p: Tensor, hidden_q: Tensor, weight: Tensor, backend: str) -> Tensor:
    return linear_kl(hidden_p, weight, hidden_q, weight, backend=backend)


def plain_jsd(
    hidden_q: Tensor, hidden_p: Tensor, weight: Tensor, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    at = weight.to(hidden_p.dtype).t()
    log_p, log_q = (torch.log_softmax((h @ at).to(out_dtype), -1) for h in (hidden_p, hidden_q))
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    kl_div = partial(torch.nn.functional.kl_div, reduction="none", log_target=True)
    return (0.5 * kl_div(log_m, log_p) + 0.5 * kl_div(log_m, log_q)).sum(-1)


def fused_jsd(hidden_q: Tensor, hidden_p: Tensor, weight: Tensor) -> Tensor:
    return linear_jsd(hidden_p, weight, hidden_q, weight)


def plain_topk(
    hidden: Tensor,
    weight: Tensor,
    token: Tensor,
    log_prob: Tensor,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    log_q = torch.log_softmax((hidden @ weight.to(hidden.dtype).t()).to(out_dtype), -1)
    of_rest = log_q.scatter(-1, token, -torch.inf).logsumexp(-1, keepdim=True)
    log_q = torch.cat([log_q.gather(-1, token), of_rest], -1)
    p = log_prob.to(out_dtype).exp()
    p = torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1)
    return torch.nn.functional.kl_div(log_q, p, reduction="none").sum(-1)


def ops(sizes: Sizes, device: torch.device) -> Iterator[Op]:
    """Make the op in each dtype: two states, [N, H], at one head, [V, H], that is not trained.

    It is there twice, with the gradient of p's states and with that of q's; the divergence and the
    KL from p's likeliest tokens are there with the gradient of q's.
    """
    for dtype in ("fp32", "bf16"):
        states = {
            name: torch.randn(sizes.N, sizes.H, device=device).to(DTYPES[dtype])
            for name in ("hidden_p", "hidden_q")
        }
        weight = (torch.randn(sizes.V, sizes.H, device=device) / sizes.H**0.5).to(DTYPES[dtype])
        grad = torch.randn(sizes.N, device=device)
        ways = {
            name: partial(fused, weight=weight, backend=backend)
            for name, backend in BACKENDS[device.type].items()
        }
        ways["plain"] = partial(plain, weight=weight)
        in_fp64 = {name: hidden.double() for name, hidden in states.items()}
        for trained, name in (("hidden_p", "linear_kl"), ("hidden_q", "linear_kl of q")):
            yield Op(
                name=name,
                dtype=dtype,
                ways={
                    way: differentiated(
                        partial(_at, function, states, trained), states[trained], grad
                    )
                    for way, function in ways.items()
                },
                moved={},
                truth=plain(**in_fp64, weight=weight, out_dtype=torch.float64),
            )
        hidden_q, of_p = states["hidden_q"], {"hidden_p": states["hidden_p"], "weight": weight}
        jsd_ways = {"latro": partial(fused_jsd, **of_p), "plain": partial(plain_jsd, **of_p)}
        of_p |= {"hidden_p": in_fp64["hidden_p"]}
        yield Op(
            name="linear_jsd",
            dtype=dtype,
            ways={
                way: differentiated(function, hidden_q, grad) for way, function in jsd_ways.items()
            },
            moved={},
            truth=plain_jsd(in_fp64["hidden_q"], **of_p, out_dtype=torch.float64),
        )
        log_p = torch.log_softmax(states["hidden_p"].float() @ weight.float().t(), -1)
        log_prob, token = log_p.topk(20)
        del log_p
        teacher = {"weight": weight, "token": token, "log_prob": log_prob}
        topk_ways = {
            "latro": partial(linear_topk_kl, **teacher),
            "plain": partial(plain_topk, **teacher),
        }
        yield Op(
            name="linear_topk_kl",
            dtype=dtype,
            ways={
                way: differentiated(function, hidden_q, grad) for way, function in topk_ways.items()
            },
            moved={},
            truth=plain_topk(hidden_q.double(), **teacher, out_dtype=torch.float64),
        )


def _at(
    function: Callable[..., Tensor], states: Mapping[str, Tensor], trained: str, leaf: Tensor
) -> Tensor:
    return function(**{**states, trained: leaf})


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the op, print its table, and put its rows into ops.json."""
    run("linear_kl", ops, __doc__, argv=argv)


if __name__ == "__main__":
    main()
