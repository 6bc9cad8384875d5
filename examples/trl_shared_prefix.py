"""TRL's RLOO with every prompt once through the trunk for all of its completions.

    python examples/trl_shared_prefix.py --max_steps 5

Word problems with the model that ships, and a reward of 1 for the right answer. The mixin is what
is not TRL's; arguments are those of `trl.RLOOConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import RLOOConfig, RLOOTrainer, TrlParser

from latro.integrations.trl import SharedPrefix
from latro.tasks import get_task

MODEL = Path(__file__).resolve().parents[1] / "latro" / "assets" / "small"


class PackedRLOO(SharedPrefix, RLOOTrainer):
    """RLOO whose log-probs share the prompts."""


def right_answer(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """TRL's reward function: 1 where a completion states the right answer."""
    task = get_task("arithmetic")
    return [
        float(task.grade(completion, {"answer": right}))
        for completion, right in zip(completions, answer, strict=True)
    ]


def train(trainer_class: type, args: RLOOConfig) -> RLOOTrainer:
    """Train, by RLOO with or without shared prefixes; return the trainer."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    rows = get_task("arithmetic").load("train", num_examples=1000)
    trainer = trainer_class(
        AutoModelForCausalLM.from_pretrained(MODEL),
        right_answer,
        args,
        rows.select_columns(["prompt", "answer"]),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


def main() -> None:
    with TemporaryDirectory() as folder:
        parser = TrlParser(RLOOConfig)
        parser.set_defaults(
            output_dir=folder,
            max_steps=10,
            learning_rate=1e-4,
            logging_steps=1,
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=48,
            beta=0.02,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
        )
        history = train(PackedRLOO, parser.parse_args_and_config()[0]).state.log_history
    rewards = [entry["reward"] for entry in history if "reward" in entry]
    print("mean reward of each update:", " ".join(f"{reward:.2f}" for reward in rewards))


if __name__ == "__main__":
    main()
