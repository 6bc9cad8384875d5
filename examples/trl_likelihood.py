"""TRL's trainers rewarded by how likely the policy finds the known answer: nothing is graded.

    python examples/trl_likelihood.py verifree --max_steps 5

Word problems with the model that ships, by LaTRO, VeriFree or RLPR; further arguments are those of
TRL's config.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, TrlParser

from latro.integrations.trl import AnswerGradient, AnswerLikelihood
from latro.tasks import get_task

MODEL = Path(__file__).resolve().parents[1] / "latro" / "assets" / "small"


class LikelihoodRLOO(AnswerGradient, RLOOTrainer):
    """RLOO, and the gradient that the answer's likelihood has of its own."""


def latro(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: RLOOConfig, rows: Dataset
) -> RLOOTrainer:
    """LaTRO, arXiv 2411.04282: log π(y|x⊕z), less the KL that RLOO subtracts."""
    reward = AnswerLikelihood(model, tokenizer)
    return LikelihoodRLOO(model, reward, args, rows, processing_class=tokenizer)


def verifree(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: RLOOConfig, rows: Dataset
) -> RLOOTrainer:
    """VeriFree, arXiv 2505.21493: π(y|x⊕z), which is also the weight of the answer's gradient."""
    reward = AnswerLikelihood(model, tokenizer, objective="verifree")
    return LikelihoodRLOO(model, reward, args, rows, processing_class=tokenizer)


def rlpr(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: GRPOConfig, rows: Dataset
) -> GRPOTrainer:
    """RLPR, arXiv 2506.18254: what z adds to the mean probability of y's tokens, by GRPO."""
    reward = AnswerLikelihood(model, tokenizer, objective="rlpr")
    return GRPOTrainer(model, reward, args, rows, processing_class=tokenizer)


METHODS: dict[str, tuple[Callable[..., Any], type, dict[str, Any]]] = {
    "latro": (latro, RLOOConfig, {"beta": 0.05}),
    "verifree": (verifree, RLOOConfig, {"beta": 0.0}),
    "rlpr": (rlpr, GRPOConfig, {"beta": 0.0}),
}


def train(method: str, args: Any) -> list[float]:
    """Train; the mean reward of each update."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    rows = get_task("arithmetic").load("train", num_examples=1000)
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    make = METHODS[method][0]
    trainer = make(model, tokenizer, args, rows.select_columns(["prompt", "answer"]))
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    print("mean reward of each update:", " ".join(f"{reward:.2f}" for reward in rewards))
    return rewards


def main() -> None:
    method = sys.argv[1] if len(sys.argv) > 1 else "none"
    if method in ("-h", "--help"):
        print(__doc__)
        return
    if method not in METHODS:
        sys.exit(f"expected one of {', '.join(METHODS)} as the first argument, got {method}")
    _, config, settings = METHODS[method]
    with TemporaryDirectory() as folder:
        parser = TrlParser(config)
        parser.set_defaults(
            output_dir=folder,
            max_steps=10,
            learning_rate=1e-4,
            logging_steps=1,
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=48,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            **settings,
        )
        train(method, parser.parse_args_and_config(sys.argv[2:])[0])


if __name__ == "__main__":
    main()
