"""The exact KL of two heads over the vocabulary, and back: `linear_kl` beside plain PyTorch.

    python benchmarks/linear_kl.py --out benchmarks/results/ops

See `common.ops` for what the columns say; ops.json in --out has all numbers, with
those of the other ops.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from benchmarks.common.ops import Op, Sizes, differentiated, run
from benchmarks.linear_logprob import DTYPES
from latro_kernels import linear_kl


def op(sizes: Sizes, dtype: str, device: torch.device) -> Op:
    """Make the op on states of policy and reference, [N, H], at one head, [V, H], not trained."""
    states = [torch.randn(sizes.N, sizes.H, device=device).to(DTYPES[dtype]) for _ in range(2)]
    weight = (torch.randn(sizes.V, sizes.H, device=device) / sizes.H**0.5).to(DTYPES[dtype])
    grad = torch.randn(sizes.N, device=device)

    def plain(x: Tensor, out_dtype: torch.dtype = torch.float32) -> Tensor:
        at = weight.to(x.dtype).t()
        log_p, log_q = (
            torch.log_softmax((h.to(x.dtype) @ at).to(out_dtype), -1) for h in (x, states[1])
        )
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    def ours(x: Tensor) -> Tensor:
        return linear_kl(x, weight, hidden_q=states[1], weight_q=weight)

    ways = {"latro": ours, "plain": plain}
    return Op(
        name="linear_kl",
        dtype=dtype,
        ways={name: differentiated(way, states[0], grad) for name, way in ways.items()},
        moved={},
        truth=plain(states[0].double(), torch.float64),
    )


def ops(sizes: Sizes, device: torch.device) -> Iterator[Op]:
    """Make the op in each dtype."""
    for dtype in ("fp32", "bf16"):
        yield op(sizes, dtype, device)


def main(argv: Sequence[str] | None = None) -> None:
    run("linear_kl", ops, __doc__, argv=argv)


if __name__ == "__main__":
    main()
