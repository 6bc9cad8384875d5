"""`python -m tests.latro.integrations.trl_update FOLDER ENGINE CASE`: one update by rewards.

All processes share eight completions of one prompt. The first writes FOLDER/found.pt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import accelerator
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from latro.config.training import SMALL_MODEL
from tests.latro.fsdp_on_cpu import ShardingState
from tests.latro.integrations.conftest import EXAMPLES, FINISHED

CASES: dict[str, dict[str, Any]] = {
    "RLOO": {},
    "GRPO": {},
    "RLOO with LoRA": {},
    "RLOO in bf16": {"bf16": True},
    "RLOO with a shared prefix": {"beta": 0.1},
}
"""Settings of each; only the first one's model has tied embeddings."""


def update(folder: str, processes: int, rank: int, engine: str, case: str) -> dict[str, Tensor]:
    """Return the weights before and after an update on eight completions of one prompt.

    With them are the log-probs of the answers' tokens.
    """
    import trl

    from latro.integrations.trl import AnswerGradient, AnswerLikelihood, SharedPrefix

    tokenizer = AutoTokenizer.from_pretrained(SMALL_MODEL, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    # The longest last, so that processes have different numbers of pieces; one is unfinished.
    texts = sorted([text for texts in FINISHED for text in texts], key=len)
    ids = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts]
    ids[5].pop()
    share = 8 // processes
    own = ids[rank * share : (rank + 1) * share]
    name = case.split(maxsplit=1)[0]

    trainer_kind: Any = getattr(trl, f"{name}Trainer")
    if "prefix" in case:
        trainer_kind = type("WithSharedPrefix", (SharedPrefix, trainer_kind), {})

    class Given(AnswerGradient, trainer_kind):  # type: ignore[misc]
        def _generate_single_turn(self, *_: Any) -> Any:
            return (own, None) if name == "GRPO" else own

    args = getattr(trl, f"{name}Config")(
        folder,
        per_device_train_batch_size=share,
        num_generations=8,
        max_steps=1,
        learning_rate=1.0,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        **{"bf16": False, "beta": 0.0, **CASES[case]},
        **settings_of(engine),
    )
    # After the arguments, since ZeRO-3 then shards it as it is loaded.
    model = AutoModelForCausalLM.from_pretrained(SMALL_MODEL if case == "RLOO" else untied(folder))
    # For GRPO in one piece, whose layers DeepSpeed would expect of TRL's forward behind it.
    budget = 500 if case == "GRPO" else 50
    reward = AnswerLikelihood(model, tokenizer, token_budget=budget)
    score, scores = reward.score, []

    def kept(*given: Any) -> list[Tensor]:
        found = score(*given)
        scores.extend(logp.detach() for logp in found)
        return found

    reward.score = kept  # type: ignore[method-assign]
    torch.manual_seed(0)
    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    trainer = Given(
        model,
        reward,
        args,
        Dataset.from_list(EXAMPLES[:1] * 4),
        processing_class=tokenizer,
        peft_config=lora if case == "RLOO with LoRA" else None,
    )
    before = weights(trainer.model)
    trainer.train()
    return {"before": before, "after": weights(trainer.model), "scores": torch.cat(scores)}


def weights(model: Any) -> Tensor:
    """Return all weights that are trained."""
    return torch.cat([whole(p).flatten() for p in model.parameters() if p.requires_grad]).double()


def settings_of(engine: str) -> dict[str, Any]:
    """Return the trainer's settings for an engine."""
    if engine == "fsdp2":
        return {"use_cpu": True, "fsdp": True, "fsdp_config": {"version": 2}}
    if engine.startswith("zero"):
        from tests.latro.zero3_on_cpu import settings

        config = {**settings(), "zero_allow_untested_optimizer": True}
        if engine == "zero2":
            config["zero_optimization"] = {"stage": 2}
        return {"use_cpu": False, "deepspeed": config}
    return {"use_cpu": True}


def untied(folder: str) -> Path:
    """Return where the small model is with a head of its own."""
    return Path(folder) / "untied"


def save_untied(folder: Path) -> None:
    """Write that model, whose head is another than its embedding."""
    model = AutoModelForCausalLM.from_pretrained(SMALL_MODEL)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(1.5 * model.lm_head.weight.detach())
    model.save_pretrained(untied(str(folder)))


def whole(parameter: Any) -> Tensor:
    """Return a weight, which an engine may have sharded."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    shard = parameter.detach()
    return shard.full_tensor() if hasattr(shard, "full_tensor") else shard


def main() -> None:
    """Update in this process, which is one of two."""
    folder, engine, case = sys.argv[1:]
    rank = int(os.environ["RANK"])
    if engine == "fsdp2":
        accelerator.AcceleratorState = ShardingState
    elif engine.startswith("zero"):
        from tests.latro.zero3_on_cpu import name_the_backend

        name_the_backend()
    found = update(folder, 2, rank, engine, case)
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")


if __name__ == "__main__":
    main()
