"""`python -m tests.latro.integrations.trl_update FOLDER ENGINE`: one update of RLOO, by rewards.

All processes share eight completions of one prompt. The first writes FOLDER/weights.pt.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from accelerate import accelerator
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from latro.config.training import SMALL_MODEL
from tests.latro.fsdp_on_cpu import ShardingState
from tests.latro.integrations.conftest import EXAMPLES, FINISHED


def update(folder: str, processes: int, rank: int, engine: str) -> Tensor:
    """Return the weights after an update on eight completions of one prompt."""
    from trl import RLOOConfig, RLOOTrainer

    from latro.integrations.trl import AnswerGradient, AnswerLikelihood

    tokenizer = AutoTokenizer.from_pretrained(SMALL_MODEL, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    # The longest last, so that processes have different numbers of pieces; one is unfinished.
    texts = sorted([text for texts in FINISHED for text in texts], key=len)
    ids = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts]
    ids[5].pop()
    share = 8 // processes

    class Given(AnswerGradient, RLOOTrainer):
        def _generate_single_turn(self, *_: Any) -> list[list[int]]:
            return ids[rank * share : (rank + 1) * share]

    model = AutoModelForCausalLM.from_pretrained(SMALL_MODEL)
    settings: dict[str, Any] = {}
    if engine == "fsdp2":
        settings = {"fsdp": True, "fsdp_config": {"version": 2}}
    args = RLOOConfig(
        folder,
        per_device_train_batch_size=share,
        num_generations=8,
        max_steps=1,
        learning_rate=1.0,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        beta=0.0,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        **settings,
    )
    reward = AnswerLikelihood(model, tokenizer, token_budget=50)
    trainer = Given(
        model, reward, args, Dataset.from_list(EXAMPLES[:1] * 4), processing_class=tokenizer
    )
    trainer.train()
    weights = (
        p.full_tensor() if engine == "fsdp2" else p.detach() for p in trainer.model.parameters()
    )
    return torch.cat([w.flatten() for w in weights]).double()


def main() -> None:
    """Update in this process, which is one of two."""
    folder, engine = sys.argv[1:]
    rank = int(os.environ["RANK"])
    if engine == "fsdp2":
        accelerator.AcceleratorState = ShardingState
    weights = update(folder, 2, rank, engine)
    if rank == 0:
        torch.save(weights, f"{folder}/weights.pt")


if __name__ == "__main__":
    main()
