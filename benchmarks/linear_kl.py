"""The exact KL of two heads over the vocabulary, and back: `linear_kl` beside plain PyTorch.

    python benchmarks/linear_kl.py --out benchmarks/results/ops

`common.ops` says what the columns hold; ops.json in --out has all numbers, with those of the other
ops.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from benchmarks.common.ops import BACKENDS, Op, Sizes, differentiated, run
from benchmarks.common.problem import DTYPES
from latro_kernels import linear_kl


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


def ops(sizes: Sizes, device: torch.device) -> Iterator[Op]:
    """Make the op in each dtype: two states, [N, H], at one head, [V, H], that is not trained.

    It is there twice, with the gradient of p's states and with that of q's.
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


def _at(
    function: Callable[..., Tensor], states: Mapping[str, Tensor], trained: str, leaf: Tensor
) -> Tensor:
    return function(**{**states, trained: leaf})


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the op, print its table, and put its rows into ops.json."""
    run("linear_kl", ops, __doc__, argv=argv)


if __name__ == "__main__":
    main()
