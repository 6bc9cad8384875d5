"""`tests.latro.last_batches FOLDER [--fsdp]`: short trainings whose epochs end ragged.

Each of `CASES` goes into a folder of its own. `WarmProcess.run_together` starts it in so many
processes; a test calls `train_case` in one, and compares.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState, accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from latro import LatroConfig, LatroTrainer
from latro.config.training import SMALL_MODEL, SftConfig
from latro.sft_trainer import SftTrainer
from latro.tasks import get_task
from tests.latro.fsdp_on_cpu import ShardingState

PROCESSES = 3

# Of each: the prompts, how many of them a device takes at once, and settings of its own.
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    # 6 an update, then 1: two processes have none.
    "one is left": (7, 2, {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3}),
    # 6 an update, then 5: the last process has half of its share.
    "a part is left": (11, 2, {"objective": "rlpr"}),
    "fewer prompts than processes": (2, 1, {"num_train_epochs": 2, "kl": "exact"}),
    # 3 a step: updates of 6 and of 3 + 1.
    "accumulation": (10, 1, {"gradient_accumulation_steps": 2, "log_completions": True}),
    # Updates of 9 and of 1, whose process has several pieces.
    "fewer steps": (10, 1, {"gradient_accumulation_steps": 3, "token_budget": 100}),
    "sft": (7, 2, {"num_train_epochs": 2}),
    "sft of answers": (10, 1, {"gradient_accumulation_steps": 2, "target": "answer"}),
}
SHARDED = ("one is left", "fewer steps", "sft")


def train_case(name: str, folder: Path, processes: int, **more: Any) -> Path:
    """Train in one of so many processes; return the folder of what came of it."""
    prompts, batch, settings = CASES[name]
    is_sft = name.startswith("sft")
    task = get_task("arithmetic")
    rows = task.load("train", num_examples=prompts, seed=3)
    model = AutoModelForCausalLM.from_pretrained(SMALL_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(SMALL_MODEL)
    output = folder / name.replace(" ", "-")
    settings = {
        "output_dir": str(output),
        "num_train_epochs": 1,
        "per_device_train_batch_size": batch * PROCESSES // processes,
        # With it Adam's steps follow the gradient; without, a last bit of a small one is worth a
        # share of the learning rate.
        "adam_epsilon": 1.0,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "max_completion_length": 40,
        "disable_tqdm": True,
        "use_cpu": True,
        **({} if is_sft else {"num_generations": 3}),
        **settings,
        **more,
    }
    resume = settings.pop("resume_from_checkpoint", None)
    trainer = (
        SftTrainer(model, SftConfig(**settings), rows, tokenizer, task)
        if is_sft
        else LatroTrainer(model, LatroConfig(**settings), rows, tokenizer, task)
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    return output


def main() -> None:
    """Train the cases, and resume one in the middle of its second epoch."""
    folder = Path(sys.argv[1])
    names: Sequence[str] = tuple(CASES)
    more = {}
    if "--fsdp" in sys.argv:
        accelerator.AcceleratorState = ShardingState
        names, more = SHARDED, {"fsdp": True}
    for name in names:
        train_case(name, folder, PROCESSES, **more)
    checkpoint = str(folder / "one-is-left" / "checkpoint-3")
    again = {"resume_from_checkpoint": checkpoint, **more}
    train_case("one is left", folder / "resumed", PROCESSES, **again)
    PartialState().destroy_process_group()
