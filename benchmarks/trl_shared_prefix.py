"""One update of TRL's `RLOOTrainer` with and without `SharedPrefix`, over lengths of the prompt.

    python benchmarks/trl_shared_prefix.py --out benchmarks/results/trl   # a minute on 2 cores

Completions are given; both score them under the policy and the reference, and once more with
gradient, and backpropagate. The two take turns. `SharedPrefix` scores with our head too, whose part
of the gain is not told apart. What went through the trunks is counted by hooks;
with K completions of C tokens at most, TRL's takes K·(P + C) positions a forward, and the other
P + Σ (C_k − 1). Written to --out: shared_prefix.json.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from benchmarks.common import report, timing
from benchmarks.common.timing import Summary
from benchmarks.updates.contenders import Trl, TrlSharedPrefix
from benchmarks.updates.problem import QUICK, ModelSize, Setting, StepProblem
from latro_kernels import environment

MODEL = ModelSize(hidden=192, intermediate=512, layers=4, heads=3, kv_heads=1)
BASE = Setting(MODEL, G=1, K=8, P=150, rationale=(50, 250), A=8, V=4096)
SETTINGS = (replace(BASE, P=32), BASE, replace(BASE, P=512, rationale=(16, 64)))


@dataclass(frozen=True)
class Row:
    """An update on one setting: seconds and tokens through the trunks, TRL's and shared.

    `gradient_error` is the largest difference of an entry over the largest of its tensor.
    """

    setting: Setting
    trl: Summary
    shared: Summary
    trl_tokens: int
    shared_tokens: int
    gradient_error: float


def measure(setting: Setting, device: torch.device, reps: int) -> Row:
    """Time and count both on one setting, and compare their gradients."""
    problem = StepProblem(setting, device)
    groups = problem.groups()
    tokens: list[int] = []
    gradients: list[list[torch.Tensor]] = []
    with tempfile.TemporaryDirectory() as folder:
        made = [
            kind(problem, Path(folder) / str(index), one_batch=True)
            for index, kind in enumerate((Trl, TrlSharedPrefix))
        ]
        for contender in made:
            with contender.counted() as passes:
                contender.update(groups)
            tokens.append(sum(one.tokens for one in passes))
            gradients.append([p.grad.clone() for p in contender.model.parameters()])
            contender.model.zero_grad()
        samples = timing.interleave(
            {one.name: {"update": partial(one.update, groups)} for one in made},
            timing.clock_for(device),
            reps=reps,
        )
    trl, shared = (timing.summarize(samples[one.name]["update"]) for one in made)
    error = max(
        ((p - q).abs().max() / q.abs().max()).item() for p, q in zip(*gradients, strict=True)
    )
    return Row(
        setting=setting,
        trl=trl,
        shared=shared,
        trl_tokens=tokens[0],
        shared_tokens=tokens[1],
        gradient_error=error,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write the file."""
    parser = report.arguments(__doc__, reps=5, quick="tiny sizes, which say nothing")
    args = parser.parse_args(argv)
    device = report.device_of(args)
    rows: list[Row] = []
    for setting in (QUICK,) if args.quick else SETTINGS:
        rows.append(measure(setting, device, args.reps))
        result = {
            "environment": environment(device, ("transformers", "trl")),
            "rows": [asdict(row) for row in rows],
        }
        # A run that is cut off keeps what it has timed.
        report.write_json(args.out / "shared_prefix.json", result)
    headings = (
        "P",
        "completions",
        "TRL, s",
        "shared, s",
        "× faster",
        "tokens",
        "shared",
        "gradient",
    )
    cells = [
        (
            str(row.setting.P),
            "{}–{}".format(*row.setting.rationale),
            report.span(row.trl),
            report.span(row.shared),
            f"{row.trl.median / row.shared.median:.2f}",
            f"{row.trl_tokens:,}",
            f"{row.shared_tokens:,}",
            f"{row.gradient_error:.0e}",
        )
        for row in rows
    ]
    report.console().print(report.table("an update of RLOO", headings, cells))
    print(f"shared_prefix.json: {args.out}")


if __name__ == "__main__":
    main()
