"""Coefficients of a million rows: `group_advantage` beside its reference in plain PyTorch.

    python benchmarks/group_advantage.py --out benchmarks/results/ops

See `common.ops` for what the columns say; ops.json in --out has all numbers, with
those of the other ops.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from benchmarks.common.ops import Op, Sizes, run
from benchmarks.common.problem import ragged_layout
from latro_kernels import group_advantage

_K = 8


def ops(sizes: Sizes, device: torch.device) -> Iterator[Op]:
    """Make the op on segments that are cut anywhere: they differ widely in length."""
    N = sizes.rows
    layout = ragged_layout(N, sizes.sequences, K=_K, device=device)
    logp, ref_logp = (-torch.rand(N, device=device) for _ in range(2))
    compute = partial(group_advantage, logp, ref_logp, layout=layout)
    yield Op(
        name="group_advantage",
        dtype="fp32",
        ways={
            "latro": {"forward": partial(compute, backend="auto")},
            "plain": {"forward": partial(compute, backend="reference")},
        },
        moved={"forward": 4 * (2 * N + int(layout.offsets.diff()[::2].sum()))},
        truth=group_advantage(
            logp.double(), ref_logp.double(), layout, backend="reference"
        ).coefficient,
    )


def main(argv: Sequence[str] | None = None) -> None:
    run("group_advantage", ops, __doc__, argv=argv)


if __name__ == "__main__":
    main()
