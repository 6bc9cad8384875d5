"""Coefficients of a million rows: `group_advantage` beside its reference in plain PyTorch.

    python benchmarks/group_advantage.py --out benchmarks/results/ops

`common.ops` says what the columns hold; ops.json in --out has all numbers, with those of the other
ops.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from benchmarks.common.ops import BACKENDS, Op, Sizes, run
from latro_kernels import GroupLayout, group_advantage

_K = {"cpu": 8, "cuda": 16}


def ragged_layout(N: int, S: int, K: int, device: torch.device) -> GroupLayout:
    """Cut N rows anywhere into S sequences, K a group: segments differ widely in length."""
    generator = torch.Generator().manual_seed(0)
    inner = 1 + torch.randperm(N - 1, generator=generator)[: 2 * S - 1].sort().values
    offsets = torch.cat([torch.tensor([0]), inner, torch.tensor([N])])
    return GroupLayout(offsets.to(device), K)


def ops(sizes: Sizes, device: torch.device) -> Iterator[Op]:
    """Make the op on ragged segments."""
    N = sizes.rows
    K = min(_K[device.type], sizes.sequences)
    layout = ragged_layout(N, sizes.sequences, K=K, device=device)
    logp, ref_logp = (-torch.rand(N, device=device) for _ in range(2))
    compute = partial(group_advantage, logp, ref_logp, layout=layout)
    backends = BACKENDS[device.type] | {"plain": "reference"}
    exact = group_advantage(logp.double(), ref_logp.double(), layout, backend="reference")
    yield Op(
        name="group_advantage",
        dtype="fp32",
        ways={way: {"forward": partial(compute, backend=name)} for way, name in backends.items()},
        moved={"forward": 4 * (2 * N + int(layout.offsets.diff()[::2].sum()))},
        truth=exact.coefficient,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the op, print its table, and put its rows into ops.json."""
    run("group_advantage", ops, __doc__, argv=argv)


if __name__ == "__main__":
    main()
