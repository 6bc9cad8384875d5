"""TRL's trainers with per-token log-probs of policy and reference from `linear_logprob`.

    python examples/trl_trainer.py --max_steps 5

GRPO on word problems with the model that ships, a reward of 1 for the right answer; RLOO is the
same mixin. Written for TRL 1.16; arguments are those of `trl.GRPOConfig`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOTrainer, TrlParser

from latro.tasks import get_task
from latro_kernels import linear_logprob

MODEL = Path(__file__).resolve().parents[1] / "latro" / "assets" / "small"


class FusedHead:
    """A mixin for TRL's online trainers: only completion tokens go through the head."""

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **of_images: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """Return log-probs and entropies [B, logits_to_keep] like TRL; 0 where no token is."""
        plain = self.accelerator.unwrap_model(model)
        config = plain.config.get_text_config()
        scaled = any(
            getattr(config, name, None)
            for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")
        )
        given = [name for name, value in of_images.items() if value is not None]
        if scaled or compute_aux_loss or given:
            raise ValueError(
                "expected a text model without router loss, its logits straight from the head, "
                f"got {type(plain).__name__} with {given}"
            )
        head = plain.get_output_embeddings()
        parts = []
        for ids, mask in zip(
            input_ids.split(batch_size or len(input_ids)),
            attention_mask.split(batch_size or len(input_ids)),
            strict=True,
        ):
            target, scored = ids[:, -logits_to_keep:], mask[:, -logits_to_keep:].bool()

            def score(hidden: Tensor, target: Tensor = target, scored: Tensor = scored) -> Tensor:
                rows = hidden[:, -logits_to_keep - 1 : -1][scored]
                both = linear_logprob(
                    rows,
                    head.weight,
                    target[scored],
                    bias=head.bias,
                    temperature=self.temperature,
                    return_entropy=True,
                )
                # Back to one row per sequence, with 0 where nothing is scored.
                whole = hidden.new_zeros(2, *target.shape, dtype=torch.float32)
                return whole.masked_scatter(scored, torch.stack(both))

            with head_replaced(head, score), self.accelerator.autocast():
                parts.append(model(input_ids=ids, attention_mask=mask, use_cache=False).logits)
        logp, entropy = torch.cat(parts, dim=1)
        return logp, entropy if compute_entropy else None, None


class FusedGRPOTrainer(FusedHead, GRPOTrainer):
    """GRPO through `linear_logprob`."""


class FusedRLOOTrainer(FusedHead, RLOOTrainer):
    """RLOO through `linear_logprob`."""


@contextmanager
def head_replaced(head: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Make the model return `function(hidden states)` instead of logits within the block.

    The module is still called, so hooks that gather sharded weights find it.
    """
    head.forward = function
    try:
        yield
    finally:
        del head.forward


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
    tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    trainer = FusedGRPOTrainer(
        AutoModelForCausalLM.from_pretrained(MODEL),
        right_answer,
        args,
        problems(1000),
        processing_class=tokenizer,
    )
    ids = tokenizer("Tom has 2 pens. Tom gets 3. How many? 2 + 3 = 5.", return_tensors="pt")
    scored = (trainer.model, ids["input_ids"], ids["attention_mask"], 8)
    with torch.no_grad():
        ours, _, _ = trainer._get_per_token_logps_and_entropies(*scored)
        trls, _, _ = GRPOTrainer._get_per_token_logps_and_entropies(trainer, *scored)
    print(f"log-probs of one completion: {(ours - trls).abs().max():.1e} nats off TRL's own")
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
