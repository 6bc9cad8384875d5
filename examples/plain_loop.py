"""Policy gradient in plain PyTorch: the loss of LaTRO from `linear_logprob` and `group_advantage`.

    python examples/plain_loop.py

The model that ships writes K rationales for a word problem, each is rewarded with the
log-probability that it gives the known answer, and both are learned from. No Trainer and no
network, seconds on a CPU; `latro_kernels` is all that is taken over into another project.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from latro.tasks import Task, get_task
from latro_kernels import GroupLayout, group_advantage, linear_logprob

MODEL = Path(__file__).resolve().parents[1] / "latro" / "assets" / "small"
TEMPLATE = " The answer is"


@dataclass(frozen=True)
class Sequences:
    """S sequences of token ids, and which of their tokens are scored."""

    prompts: list[list[int]]
    rationales: list[list[int]]
    between: list[list[int]]  # read before the answer, and not scored
    answers: list[list[int]]

    def rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return padded ids [S, T], and for N scored tokens three tensors.

        These are the place [N] in ids.flatten() that predicts each token, the token [N], and the
        offsets [2·S + 1] where each rationale and each answer begins among the N.
        """
        parts = list(zip(self.prompts, self.rationales, self.between, self.answers, strict=True))
        width = max(sum(map(len, part)) for part in parts)
        ids = torch.zeros(len(parts), width, dtype=torch.int64)
        places, offsets = [], [0]
        for s, (prompt, rationale, between, answer) in enumerate(parts):
            whole = prompt + rationale + between + answer
            ids[s, : len(whole)] = torch.tensor(whole)
            for end, length in (
                (len(prompt) + len(rationale), len(rationale)),
                (len(whole), len(answer)),
            ):
                places.append(torch.arange(end - length, end) + s * width - 1)
                offsets.append(offsets[-1] + length)
        place = torch.cat(places)
        return ids, place, ids.flatten()[place + 1], torch.tensor(offsets)


def hidden_states(model: PreTrainedModel, ids: Tensor, place: Tensor) -> Tensor:
    """Return the trunk's output [N, H] at the scored rows only.

    Padding is on the right, where causal attention does not look, so no mask is needed.
    """
    return model.base_model(ids, use_cache=False).last_hidden_state.flatten(0, 1)[place]


@torch.no_grad()
def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict], K: int
) -> tuple[Sequences, Tensor]:
    """Return K rationales per row joined to its answer, and bool [S], whether each is finished."""
    prompts = [tokenizer.encode(row["prompt"]) for row in rows for _ in range(K)]
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    end = tokenizer.eos_token_id
    sampled = model.generate(
        **batch,
        do_sample=True,
        top_k=0,  # the whole distribution: what is scored has to be what was sampled
        max_new_tokens=48,
        stop_strings=[TEMPLATE],
        tokenizer=tokenizer,
        pad_token_id=end,
    )[:, batch["input_ids"].shape[1] :].tolist()
    rationales = [ids[: ids.index(end)] if end in ids else ids for ids in sampled]
    finished = [tokenizer.decode(ids).endswith(TEMPLATE) for ids in rationales]
    answers = [[*tokenizer.encode(f" {row['answer']}"), end] for row in rows for _ in range(K)]
    template = tokenizer.encode(TEMPLATE)
    between = [[] if has_template else template for has_template in finished]
    return Sequences(prompts, rationales, between, answers), torch.tensor(finished)


def train(steps: int, prompts: int, K: int, beta: float, seed: int) -> tuple[float, float]:
    """Train, print a line per update, and return held-out accuracy before and after."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    reference = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0.0)
    task = get_task("arithmetic")
    rows = task.load("train", num_examples=steps * prompts, seed=seed).to_list()
    held_out = task.load("validation", num_examples=64).to_list()
    before = accuracy(model, tokenizer, task, held_out)
    for step in range(steps):
        chosen = rows[step * prompts : (step + 1) * prompts]
        sequences, finished = sample(model, tokenizer, chosen, K)
        ids, place, target, offsets = sequences.rows()

        # This replaces logits of all rows: N rows go through the head, without a tensor of N·V.
        logp = linear_logprob(hidden_states(model, ids, place), model.lm_head.weight, target)
        with torch.no_grad():
            ref_hidden = hidden_states(reference, ids, place)
            ref_logp = linear_logprob(ref_hidden, reference.lm_head.weight, target)

        # One constant per row: minus the advantage on rationales, a likelihood's on answers.
        layout = GroupLayout(offsets, num_generations=K, finished=finished)
        out = group_advantage(logp, ref_logp, layout, beta=beta)
        (out.coefficient * logp).sum().backward()

        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        spared = 4 * len(target) * len(model.lm_head.weight) / 2**20
        print(
            f"update {step + 1}: log π(y|x⊕z) {out.answer_logp.mean():.2f}, "
            f"KL {out.kl.mean():.2f}, {len(target)} rows, {spared:.1f} MiB of logits not made"
        )
    after = accuracy(model, tokenizer, task, held_out)
    print(f"{len(held_out)} held-out problems: {before:.0%} right before, {after:.0%} after")
    return before, after


@torch.no_grad()
def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, rows: Sequence[dict]
) -> float:
    """Return the share of problems that the model solves with greedy decoding."""
    prompts = [tokenizer.encode(row["prompt"]) for row in rows]
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    ids = model.generate(
        **batch, do_sample=False, max_new_tokens=64, pad_token_id=tokenizer.eos_token_id
    )
    texts = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(map(task.grade, texts, rows)) / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20, help="updates")
    parser.add_argument("--prompts", type=int, default=8, help="prompts per update")
    parser.add_argument("--K", type=int, default=8, help="rationales per prompt")
    parser.add_argument("--beta", type=float, default=0.05, help="weight of the KL")
    parser.add_argument("--seed", type=int, default=0)
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
