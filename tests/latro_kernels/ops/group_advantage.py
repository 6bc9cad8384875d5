"""group_advantage for the tests of all ops, and batches for its own."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from latro_kernels import GroupAdvantage, GroupLayout, group_advantage
from latro_kernels.group_advantage import KL_FORMS, UNFINISHED_RULES
from latro_kernels.group_advantage.formulas import reference
from tests.latro_kernels.ops import op
from tests.latro_kernels.ops.op import INTERPRETED, Op, Problem, Results

FIELDS = [field.name for field in fields(GroupAdvantage)]
SETTINGS = [{"kl": kl, "unfinished": rule} for kl in KL_FORMS for rule in UNFINISHED_RULES]


@dataclass(frozen=True)
class Batch:
    """The inputs of one call of any form of KL."""

    logp: Tensor
    ref_logp: Tensor
    row_kl: Tensor
    layout: GroupLayout

    def problem(self, **settings: Any) -> Problem:
        """Make the call with these settings."""
        exact = settings.get("kl", "reward") == "exact"
        arguments = {
            "logp": self.logp,
            "ref_logp": None if exact else self.ref_logp,
            "row_kl": self.row_kl if exact else None,
        }
        return Problem(op=OP, arguments=arguments | vars(self.layout) | settings)


def answer_rows(offsets: Tensor) -> Tensor:
    """Return which rows are of answers, bool [N]."""
    segment = torch.arange(offsets.numel() - 1, device=offsets.device)
    return torch.repeat_interleave(segment, offsets.diff()) % 2 == 1


def make_batch(
    lengths: list[int],
    num_generations: int,
    *,
    finished: list[bool] | None = None,
    num_groups: int | None = None,
    seed: int = 0,
) -> Batch:
    """Make a batch of segments of these lengths.

    ref_logp and row_kl are NaN on answer rows: nobody computes them there.
    """
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    N = sum(lengths)
    logp = -torch.rand(N, generator=generator) * 8
    ref_logp = torch.minimum(logp + torch.randn(N, generator=generator), torch.zeros(()))
    row_kl = torch.rand(N, generator=generator)
    for unread in (ref_logp, row_kl):
        unread[answer_rows(offsets)] = torch.nan
    flags = None if finished is None else torch.tensor(finished, dtype=torch.bool)
    return Batch(logp, ref_logp, row_kl, GroupLayout(offsets, num_generations, flags, num_groups))


def ragged_batch(num_generations: int) -> Batch:
    """Make 1.8 M rows: segments of 1 to 100 rows and, together and apart, some of up to 100,000."""
    draw = random.Random(0)
    lengths = [draw.randint(1, 100) for _ in range(2048)]
    for i in (*range(16), *range(64, 2048, 42)):
        lengths[i] = draw.randint(1, 50_000)
    lengths[2047] = 100_000
    return make_batch(lengths, num_generations, finished=_flags(1024, 0.9, draw))


def _flags(count: int, chance: float, draw: random.Random) -> list[bool]:
    return [draw.random() < chance for _ in range(count)]


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Draw ragged groups: empty segments, no groups, any sequences unfinished."""
    K, G = draw(st.integers(2, 9)), draw(st.integers(0, 5))
    lengths = draw(st.lists(st.integers(0, 50), min_size=2 * G * K, max_size=2 * G * K))
    finished = st.lists(st.booleans(), min_size=G * K, max_size=G * K)
    return make_batch(
        lengths,
        K,
        finished=draw(st.none() | finished),
        num_groups=draw(st.none() | st.integers(max(1, G), 20)),
        seed=draw(st.integers(0, 2**31)),
    )


def _called(
    function: Any,
    *,
    offsets: Tensor,
    num_generations: int,
    finished: Tensor | None = None,
    num_groups: int | None = None,
    **arguments: Any,
) -> Results:
    layout = GroupLayout(offsets, num_generations, finished, num_groups)
    return present(function(layout=layout, **arguments))


def present(out: GroupAdvantage) -> Results:
    """Return the fields that there are, by name."""
    return {name: getattr(out, name) for name in FIELDS if getattr(out, name) is not None}


def assert_same(left: GroupAdvantage, right: GroupAdvantage) -> None:
    """Fail unless every field has the same bits."""
    op.assert_same(present(left), present(right))


SMALL = make_batch([3, 2, 0, 1, 4, 3, 2, 5], 2, finished=[True, False, True, True])


def sample(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Problem:
    """Make a batch of a size at which kernels do something else."""
    draw = random.Random(0)
    if name == "long segments":
        lengths = [2_000, 3, 0, 511] if INTERPRETED else [100_000, 3, 0, 70_001]
        return make_batch(lengths, 2).problem(**settings)
    if name == "many sequences":
        K, longest = (40, 9) if INTERPRETED else (1024, 40)
        finished = _flags(K, 0.9, draw)
        lengths = [draw.randrange(longest) for _ in range(2 * K)]
        return make_batch(lengths, K, finished=finished).problem(**settings)
    if name == "forty-eight segments":
        return make_batch([900 + 7 * i for i in range(48)], 4).problem(**settings)
    # Segments that end on a kernel's block of rows, or beside it, and empty ones there.
    K = 3 if INTERPRETED else 33
    lengths = [draw.choice([0, 1, 128, 255, 256, 512]) for _ in range(10 * K)]
    finished = _flags(5 * K, 0.7, draw)
    return make_batch(lengths, K, finished=finished).problem(**settings)


def _of_rows(N: int, dtype: torch.dtype = torch.float32, **settings: Any) -> Problem:
    """Make two sequences of N rows; logp is fp32 whatever the dtype."""
    quarters = [N // 4, N // 2 - N // 4, 3 * N // 4 - N // 2, N - 3 * N // 4]
    return make_batch(quarters, 2, finished=[True, False]).problem(**settings)


def _strided(given: Problem) -> list[Problem]:
    """Columns of one tensor, which requires a gradient that does not come."""
    columns = torch.stack([given["logp"], given["ref_logp"]], 1).requires_grad_()
    return [given.but(logp=columns[:, 0], ref_logp=columns[:, 1])]


OFFSETS = SMALL.layout.offsets
BAD = [
    ({"logp": [1.0]}, TypeError, "logp: expected a tensor, got list"),
    ({"logp": SMALL.logp.double()}, TypeError, "logp: expected dtype torch.float32, got"),
    ({"logp": SMALL.logp[None]}, ValueError, r"logp: expected one dimension, got shape \(1, 20\)"),
    ({"logp": SMALL.logp.half(), "backend": "reference"}, TypeError, "float32 or torch.float64"),
    ({"ref_logp": SMALL.ref_logp[:-1]}, ValueError, r"ref_logp: expected shape \(20,\), got"),
    ({"ref_logp": SMALL.ref_logp.double()}, TypeError, "ref_logp: expected dtype torch.float32"),
    ({"ref_logp": SMALL.ref_logp.to("meta")}, ValueError, "ref_logp: expected device cpu"),
    ({"ref_logp": None}, ValueError, "ref_logp: expected a tensor where beta is not 0, got None"),
    ({"offsets": OFFSETS.to("meta")}, ValueError, "layout.offsets: expected the device of logp"),
    ({"offsets": OFFSETS.int()}, TypeError, "offsets: expected dtype torch.int64, got torch.int32"),
    ({"offsets": OFFSETS[:-1]}, ValueError, "offsets: expected two segments a sequence"),
    ({"offsets": OFFSETS[:0]}, ValueError, "offsets: expected two segments a sequence"),
    ({"num_generations": 3}, ValueError, "expected whole groups of num_generations=3 sequences"),
    ({"num_generations": 1}, ValueError, "num_generations: expected 2 or more, got 1"),
    ({"num_generations": 2.0}, TypeError, "num_generations: expected an int, got float"),
    ({"num_groups": 1}, ValueError, "num_groups: expected 2 or more, got 1"),
    ({"num_groups": True}, TypeError, "num_groups: expected an int, got bool"),
    ({"finished": torch.ones(4)}, TypeError, "finished: expected dtype torch.bool"),
    ({"finished": torch.ones(3).bool()}, ValueError, r"finished: expected shape \(4,\), got \(3,"),
    ({"finished": torch.ones(4).bool().to("meta")}, ValueError, "finished: expected device cpu"),
    ({"beta": -0.1}, ValueError, "beta: expected 0 or more, got -0.1"),
    ({"beta": float("nan")}, ValueError, "beta: expected a finite number, got nan"),
    ({"beta": "0.1"}, TypeError, "beta: expected a float, got str"),
    ({"answer_weight": float("inf")}, ValueError, "answer_weight: expected a finite number"),
    *(
        ({name: value}, ValueError, f"^{name}: expected a ")
        for name in ("beta", "answer_weight")
        for value in (1e39, float("nan"), float("inf"), 10**400)
    ),
    ({"kl": "k1"}, ValueError, "kl: expected one of 'reward', 'k3', 'exact', got 'k1'"),
    ({"kl": "exact"}, ValueError, "ref_logp: expected None with kl='exact', got a tensor"),
    ({"kl": "exact", "ref_logp": None}, ValueError, "row_kl: expected a tensor where beta is not"),
    ({"row_kl": SMALL.logp}, ValueError, "row_kl: expected None with kl='reward', got a tensor"),
    ({"row_kl": SMALL.logp[1:]}, ValueError, r"row_kl: expected shape \(20,\), got"),
    ({"row_kl": SMALL.logp.double()}, TypeError, "row_kl: expected dtype torch.float32"),
    ({"unfinished": "drop"}, ValueError, "unfinished: expected one of 'floor', 'exclude', got"),
]
OP = Op(
    name="group_advantage",
    function=lambda **arguments: _called(group_advantage, **arguments),
    reference=lambda **arguments: _called(reference, **arguments),
    unfused=lambda **arguments: _called(reference, **arguments),
    outputs=tuple(FIELDS),
    of_rows=_of_rows,
    problem=sample,
    uneven=["forty-eight segments"],
    samples=[
        (name, torch.float32, setting)
        for name in ("long segments", "many sequences", "segments that meet where kernels cut")
        for setting in SETTINGS
    ],
    draws=st.builds(
        lambda batch, beta, answer_weight, setting: batch.problem(
            beta=beta, answer_weight=answer_weight, **setting
        ),
        batches(),
        st.floats(0, 1),
        st.floats(0, 2),
        st.sampled_from(SETTINGS),
    ),
    forms={
        **{"-".join(setting.values()): setting for setting in SETTINGS},
        "without a reference": {"beta": 0.0, "ref_logp": None, "finished": None},
    },
    strided=_strided,
    good={
        "logp": SMALL.logp,
        "ref_logp": SMALL.ref_logp,
        "offsets": OFFSETS,
        "num_generations": 2,
    },
    bad=BAD,
)
