"""Log-probs from logits that exist, and back: `gather_logprob` beside plain PyTorch.

    python benchmarks/gather_logprob.py --out benchmarks/results/ops

Ours writes the gradient to memory of its own, or over the logits themselves. `common.ops` says what
the columns hold; ops.json in --out has all numbers, with those of the other ops.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from benchmarks.common.ops import BACKENDS, Op, Sizes, differentiated, run
from benchmarks.common.problem import DTYPES
from latro_kernels import gather_logprob


def plain(z: Tensor, target: Tensor) -> Tensor:
    return torch.log_softmax(z.float(), -1).gather(1, target[:, None]).squeeze(1)


def in_place(z: Tensor, target: Tensor, backend: str) -> Tensor:
    # A view: a leaf may not be written over. What becomes of the logits costs the same.
    return gather_logprob(z.view_as(z), target, inplace_backward=True, backend=backend)


def ops(sizes: Sizes, device: torch.device) -> Iterator[Op]:
    """Make the op on [N, V] logits, in each dtype."""
    for dtype in ("fp32", "bf16"):
        logits = torch.randn(sizes.N, sizes.V, device=device).to(DTYPES[dtype])
        target = torch.randint(sizes.V, (sizes.N,), device=device)
        grad = torch.randn(sizes.N, device=device)
        ways = {}
        for name, backend in BACKENDS[device.type].items():
            ways[name] = partial(gather_logprob, target=target, backend=backend)
            ways[f"{name}, in place"] = partial(in_place, target=target, backend=backend)
        ways["plain"] = partial(plain, target=target)
        yield Op(
            name="gather_logprob",
            dtype=dtype,
            ways={name: differentiated(way, logits, grad) for name, way in ways.items()},
            moved={"forward": logits.nbytes, "backward": 2 * logits.nbytes},
            truth=torch.log_softmax(logits.double(), -1).gather(1, target[:, None]).squeeze(1),
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the op, print its table, and put its rows into ops.json."""
    run("gather_logprob", ops, __doc__, argv=argv)


if __name__ == "__main__":
    main()
