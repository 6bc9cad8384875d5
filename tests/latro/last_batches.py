"""`tests.latro.last_batches FOLDER [ENGINE]`: short trainings with a ragged end of each epoch.

Each of `CASES` writes into a folder of its own. `WarmProcess.run_together` runs them in several
processes; a test calls `train_case` in a single process, and compares.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState, accelerator
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from latro import LatroConfig, LatroTrainer
from latro.config.training import SMALL_MODEL, SftConfig
from latro.model.distribution import whole_on_load
from latro.sft_trainer import SftTrainer
from latro.tasks import get_task
from tests.latro import zero3_on_cpu
from tests.latro.fsdp_on_cpu import ShardingState

PROCESSES = 3

# For each case: number of prompts, batch size per device, and further settings.
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    # Updates of 6 prompts and of 1, which leaves two processes without any.
    "one is left": (7, 2, {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3}),
    # The same where the embedding is sharded apart from the head.
    "one is left of an untied model": (7, 2, {}),
    # Updates of 6 prompts and of 5, where the last process has half of its share.
    "a part is left": (11, 2, {"objective": "rlpr"}),
    "fewer prompts than processes": (2, 1, {"num_train_epochs": 2, "kl": "exact"}),
    # Steps of 3 prompts: updates of 6 and of 3 + 1.
    "accumulation": (10, 1, {"gradient_accumulation_steps": 2, "log_completions": True}),
    # Updates of 9 prompts and of 1, which one process cuts into several pieces.
    "fewer steps": (10, 1, {"gradient_accumulation_steps": 3, "token_budget": 100}),
    "sft": (7, 2, {"num_train_epochs": 2}),
    "sft of answers": (10, 1, {"gradient_accumulation_steps": 2, "target": "answer"}),
}
SHARDED = ("one is left", "one is left of an untied model", "fewer steps", "sft")


def train_case(name: str, folder: Path, processes: int, **more: Any) -> Path:
    """Train in one of `processes` processes, and return the folder with the result."""
    prompts, batch, settings = CASES[name]
    is_sft = name.startswith("sft")
    task = get_task("arithmetic")
    rows = task.load("train", num_examples=prompts, seed=3)
    # The case before may have asked for ZeRO-3.
    with whole_on_load():
        model = AutoModelForCausalLM.from_pretrained(SMALL_MODEL)
    if name.endswith("untied model"):
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    tokenizer = AutoTokenizer.from_pretrained(SMALL_MODEL)
    output = folder / name.replace(" ", "-")
    settings = {
        "output_dir": str(output),
        "num_train_epochs": 1,
        "per_device_train_batch_size": batch * PROCESSES // processes,
        # A large ε makes Adam's steps proportional to the gradient; otherwise rounding of a small
        # gradient would change a weight by a share of the learning rate.
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
    more: dict[str, Any] = {}
    if "fsdp2" in sys.argv:
        accelerator.AcceleratorState = ShardingState
        names, more = SHARDED, {"fsdp": True}
    if "zero3" in sys.argv:
        zero3_on_cpu.name_the_backend()
        names, more = SHARDED, {"use_cpu": False, "deepspeed": zero3_on_cpu.settings()}
    for name in names:
        train_case(name, folder, PROCESSES, **more)
    checkpoint = str(folder / "one-is-left" / "checkpoint-3")
    again = {"resume_from_checkpoint": checkpoint, **more}
    train_case("one is left", folder / "resumed", PROCESSES, **again)
    PartialState().destroy_process_group()
