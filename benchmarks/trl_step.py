"""A step of TRL's `RLOOTrainer` and `SFTTrainer` with `patch_trl()` on and off.

    python benchmarks/trl_step.py --dtypes fp32 --out benchmarks/results/trl   # minutes on 2 cores

Completions of RLOO are given: it scores them under policy and reference, then once more with
gradient, and backpropagates. SFT learns every token of the same sequences. One trainer does both
ways in turns, so that weights and batches are the same; that the gradients are is measured too.
Memory is the peak beyond the weights, gradients included, each way in a process of its own on a
CPU. The optimiser, which is the same for both, is left out.

TRL's tiles are as many columns of the vocabulary wide as its trainers make them. Written to --out:
step.json.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from benchmarks.common import memory, report, timing
from benchmarks.common.report import some_of
from benchmarks.common.timing import Summary
from benchmarks.updates.contenders import Trl
from benchmarks.updates.problem import QUICK, SMALL, ModelSize, Setting, StepProblem
from latro_kernels import environment
from latro_kernels.integrations.trl import patch_trl

SMALL_TRUNK = ModelSize(hidden=192, intermediate=512, layers=4, heads=3, kv_heads=1)
BASE = Setting(SMALL, G=1, K=8, P=50, rationale=(25, 75), A=8, V=32000)
SETTINGS = (BASE, replace(BASE, model=SMALL_TRUNK, V=128256))
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
WAYS = ("trl", "patched")

Step = tuple[nn.Module, Callable[[], object]]
"""The model, and a call that adds a step's gradients to it."""


def rloo(setting: Setting, device: torch.device, folder: Path) -> Step:
    """Make an update of RLOO, all sequences in one batch."""
    problem = StepProblem(setting, device)
    contender = Trl(problem, folder, one_batch=True)
    return contender.model, partial(contender.update, problem.groups())


def sft(setting: Setting, device: torch.device, folder: Path) -> Step:
    """Make a step of SFT on the sequences of RLOO, all in one batch and every token a label."""
    from trl import SFTConfig, SFTTrainer

    problem = StepProblem(setting, device)
    model, _ = problem.models()
    sequences = [
        [*rollout.prompt_ids, *rollout.sampled_ids]
        for group in problem.groups()
        for rollout in group
    ]
    tokenizer = problem.tokenizer
    tokenizer.pad_token = tokenizer.eos_token
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            str(folder),
            per_device_train_batch_size=len(sequences),
            bf16=False,  # the weights have their dtype already
            activation_checkpointing=False,
            use_cpu=device.type == "cpu",
            disable_tqdm=True,
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in sequences]),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1  # set by the loop that is not run
    (batch,) = trainer.get_train_dataloader()
    # A step takes what it is given out of the batch.
    return model, lambda: trainer.training_step(model, dict(batch), None)


STEPS: dict[str, Callable[[Setting, torch.device, Path], Step]] = {"RLOO": rloo, "SFT": sft}


@dataclass(frozen=True)
class Row:
    """A step of one trainer on one setting: seconds and peak bytes by way, of `WAYS`.

    Bytes are None where they were not measured. `gradient_error` is the largest difference of an
    entry over the largest of its tensor.
    """

    trainer: str
    setting: Setting
    times: dict[str, Summary]
    peak: dict[str, int | None]
    gradient_error: float


def measure(name: str, setting: Setting, device: torch.device, reps: int) -> Row:
    """Compare both ways' gradients, time them in turns, and measure their memory."""
    gradients: dict[str, list[Tensor]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model, step = STEPS[name](setting, device, Path(folder))
        for way in WAYS:
            _run(way, model, step)
            gradients[way] = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        samples = timing.interleave(
            {way: {"step": partial(_run, way, model, step)} for way in WAYS},
            timing.clock_for(device),
            reps=reps,
            warmup=0,
        )
    pairs = zip(gradients["patched"], gradients["trl"], strict=True)
    return Row(
        trainer=name,
        setting=setting,
        times={way: timing.summarize(samples[way]["step"]) for way in WAYS},
        peak={
            way: memory.measured(
                partial(_peak, name, way, device=device),
                setting,
                device,
                tiny=replace(setting, K=2, P=4, rationale=(2, 4)),
                name=f"{name}, {way}",
                failures=(torch.OutOfMemoryError,),
            )
            for way in WAYS
        },
        gradient_error=max(((p - q).abs().max() / q.abs().max()).item() for p, q in pairs),
    )


def _run(way: str, model: nn.Module, step: Callable[[], object]) -> None:
    model.zero_grad()
    with patch_trl() if way == "patched" else nullcontext():
        step()


def _peak(name: str, way: str, setting: Setting, *, device: torch.device) -> int:
    """Return peak bytes of a step beyond the weights; gradients are counted."""
    with tempfile.TemporaryDirectory() as folder:
        model, step = STEPS[name](setting, device, Path(folder))
        return memory.peak_extra_bytes(partial(_run, way, model, step), device)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write the file."""
    parser = report.arguments(__doc__, reps=3, quick="tiny sizes, which say nothing")
    parser.add_argument(
        "--dtypes",
        type=some_of(DTYPES),
        default=list(DTYPES),
        help=f"comma-separated, of {', '.join(DTYPES)}",
    )
    args = parser.parse_args(argv)
    device = report.device_of(args)
    rows: list[Row] = []
    for dtype in args.dtypes:
        for setting in (QUICK,) if args.quick else SETTINGS:
            model = replace(setting.model, dtype=DTYPES[dtype])
            for name in STEPS:
                rows.append(measure(name, replace(setting, model=model), device, args.reps))
                result = {
                    "environment": environment(device, ("transformers", "trl")),
                    "rows": [asdict(row) for row in rows],
                }
                # A run that is cut off keeps what it has timed.
                report.write_json(args.out / "step.json", result)
    headings = (
        *("", "V", "dtype", "TRL, s", "patched, s", "× faster", "TRL, MiB", "patched, MiB"),
        "gradient's difference",
    )
    cells = [
        (
            row.trainer,
            f"{row.setting.V:,}",
            row.setting.model.dtype,
            *(report.span(row.times[way]) for way in WAYS),
            f"{row.times['trl'].median / row.times['patched'].median:.2f}",
            *(report.mib(row.peak[way], 0) for way in WAYS),
            f"{row.gradient_error:.0e}",
        )
        for row in rows
    ]
    report.console().print(report.table("a step", headings, cells))
    print(f"step.json: {args.out}")


if __name__ == "__main__":
    main()
