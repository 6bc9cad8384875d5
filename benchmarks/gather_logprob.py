"""Log-probs from logits that exist, and back: `gather_logprob` beside plain PyTorch.

    python benchmarks/gather_logprob.py --out benchmarks/results/ops

Ours writes the gradient to memory of its own, or over the logits themselves. See `common.ops` for
what the columns say; ops.json in --out has all numbers, with
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
from latro_kernels import gather_logprob


def ops(sizes: Sizes, device: torch.device) -> Iterator[Op]:
    """Make the op on [N, V] logits, in each dtype."""
    for dtype in ("fp32", "bf16"):
        logits = torch.randn(sizes.N, sizes.V, device=device).to(DTYPES[dtype])
        target = torch.randint(sizes.V, (sizes.N,), device=device)
        grad = torch.randn(sizes.N, device=device)

        def plain(z: Tensor, target: Tensor = target) -> Tensor:
            return torch.log_softmax(z.float(), -1).gather(1, target[:, None]).squeeze(1)

        def ours(z: Tensor, target: Tensor = target) -> Tensor:
            return gather_logprob(z, target)

        def in_place(z: Tensor, target: Tensor = target) -> Tensor:
            # A view: a leaf may not be written over. What becomes of the logits costs the same.
            return gather_logprob(z.view_as(z), target, inplace_backward=True)

        ways = {"latro": ours, "latro, in place": in_place, "plain": plain}
        log_p = torch.log_softmax(logits.double(), -1)
        yield Op(
            name="gather_logprob",
            dtype=dtype,
            ways={name: differentiated(way, logits, grad) for name, way in ways.items()},
            moved={"forward": logits.nbytes, "backward": 2 * logits.nbytes},
            truth=log_p.gather(1, target[:, None]).squeeze(1),
        )


def main(argv: Sequence[str] | None = None) -> None:
    run("gather_logprob", ops, __doc__, argv=argv)


if __name__ == "__main__":
    main()
