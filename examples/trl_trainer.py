"""TRL's GRPO with per-token log-probs of policy and reference from `linear_logprob`.

    python examples/trl_trainer.py --max_steps 5

Word problems with the model that ships, and a reward of 1 for the right answer. `patch_trl()` is
the one line that is not TRL's; arguments are those of `trl.GRPOConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, TrlParser

from latro.tasks import get_task
from latro_kernels.integrations.trl import patch_trl

MODEL = Path(__file__).resolve().parents[1] / "latro" / "assets" / "small"


def right_answer(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """TRL's reward function: 1 where a completion states the right answer."""
    task = get_task("arithmetic")
    return [
        float(task.grade(completion, {"answer": right}))
        for completion, right in zip(completions, answer, strict=True)
    ]


def problems(count: int) -> Dataset:
    """Word problems with the columns that TRL and the reward want."""
    rows = get_task("arithmetic").load("train", num_examples=count)
    return rows.select_columns(["prompt", "answer"])


def train(args: GRPOConfig) -> list[float]:
    """Train; the mean reward of each update."""
    patch_trl()
    tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(MODEL),
        right_answer,
        args,
        problems(1000),
        processing_class=tokenizer,
    )
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    print("mean reward of each update:", " ".join(f"{reward:.2f}" for reward in rewards))
    return rewards


def main() -> None:
    with TemporaryDirectory() as folder:
        parser = TrlParser(GRPOConfig)
        parser.set_defaults(
            **{"output_dir": folder, "max_steps": 10, "learning_rate": 1e-4, "logging_steps": 1},
            **{"per_device_train_batch_size": 32, "num_generations": 8, "beta": 0.02},
            **{"max_completion_length": 48, "report_to": "none", "save_strategy": "no"},
            **{"use_cpu": True, "bf16": False},
        )
        train(parser.parse_args_and_config()[0])


if __name__ == "__main__":
    main()
