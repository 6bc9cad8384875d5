"""The LaTRO update as its authors' code computes it, in our own words.

Of SalesforceAIResearch/LaTRO at ff18ac3, the code of arXiv 2411.04282, this has the order of the
work, its shapes and its dtypes:

- K copies of each prompt are sampled, each with a prefill of its own and every one of them to the
  length limit, the end token being disabled; the scores of every step are kept and stacked;
- rows are padded at the left to the longest prompt plus the length limit, and the answers' rows to
  the longest answer beyond that;
- three forwards without gradient give log π(z|x), log π_0(z|x) and log π(y|x⊕z), each through
  logits and log-softmax [B, T, V] of prompt, padding and answer alike, in the model's dtype;
- micro-batches of shuffled sequences then go through two forwards with gradient, over x⊕z and over
  x⊕z⊕y, whose graphs stand side by side until one backward.

Faults of that code which change its numbers and not its cost are mended: the reward covers answer
tokens only, what ends a rationale belongs to it, the answer's gradient has its weight λ, and there
is no penalty of twice the mean reward. So the gradient is `LatroTrainer`'s, and a test holds it to
that. The emptying of caches and collecting of garbage, 124 times an update, is left out: it would
only make this slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from benchmarks.updates.contenders import BETA, Contender, Groups
from benchmarks.updates.problem import StepProblem


@dataclass(frozen=True)
class _Rows:
    """Sequences padded at the left.

    Attributes:
        input_ids: int64 [B, T].
        mask: bool [B, T], False at padding.
        scored: int64 [B], the number of tokens at the end of each row that are scored.
    """

    input_ids: Tensor
    mask: Tensor
    scored: Tensor

    def __getitem__(self, index: slice | Tensor) -> _Rows:
        return _Rows(self.input_ids[index], self.mask[index], self.scored[index])


class Published(Contender):
    """The published algorithm.

    Args:
        problem: what is worked on.
        folder: is not used, as nothing is written.
        one_batch: whether all sequences are scored and trained on at once, as in ours.
        beta: the weight of the KL.
        answer_weight: λ, the weight of the answers' gradient.
        scoring_batch: sequences scored at once, if not all; 48 in the published recipe.
        micro_batch: sequences trained on at once, if not all; 4 in the published recipe.
        seed: of the order of the sequences.

    Attributes:
        lengths: where rationales end that the next step samples: it decodes all to the limit.
    """

    name = "published"

    def __init__(
        self,
        problem: StepProblem,
        folder: Path,
        one_batch: bool = True,
        *,
        beta: float = BETA,
        answer_weight: float = 1.0,
        scoring_batch: int = 48,
        micro_batch: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__(problem)
        setting = problem.setting
        self.lengths = [setting.lengths] * setting.G
        self._limit = setting.rationale[1]
        self._beta, self._answer_weight = beta, answer_weight
        sequences = setting.G * setting.K
        self._scoring_batch = sequences if one_batch else scoring_batch
        self._micro_batch = sequences if one_batch else micro_batch
        self._generator = torch.Generator().manual_seed(seed)

    def step(self) -> None:
        encode = self.problem.tokenizer.encode
        samples = iter(self.sample([encode(row["prompt"]) for row in self.problem.rows()]))
        cut = [[next(samples)[: length - 1] for length in group] for group in self.lengths]
        self.update(self.problem.join_all(cut))

    @torch.no_grad()
    def sample(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Sample K completions of each prompt in turn, all of `max_completion_length` tokens."""
        longest = max(map(len, prompts))
        rows = self._pad([p for p in prompts for _ in range(self.problem.setting.K)], [], longest)
        own_config = self.model.generation_config
        # The library would take an end token from the model's own configuration.
        self.model.generation_config = GenerationConfig(
            max_new_tokens=self._limit,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=0,
        )
        try:
            output = self.model.generate(
                rows.input_ids,
                attention_mask=rows.mask,
                return_dict_in_generate=True,
                output_scores=True,
            )
        finally:
            self.model.generation_config = own_config
        torch.stack(output.scores, dim=1)
        return output.sequences[:, longest:].tolist()

    def update(self, groups: Groups) -> Tensor:
        """Add the gradient of the loss over whole groups of K; return the loss, detached.

        Raises:
            ValueError: a group is not of K, or a rationale is longer than the limit.
        """
        K, limit = self.problem.setting.K, self._limit
        if any(len(group) != K for group in groups):
            raise ValueError(f"groups: expected {K} sequences each, got {[*map(len, groups)]}")
        rollouts = list(chain.from_iterable(groups))
        if (longest := max(len(r.sampled_ids) for r in rollouts)) > limit:
            raise ValueError(f"groups: expected rationales of up to {limit} tokens, got {longest}")

        width = max(len(r.prompt_ids) for r in rollouts) + limit
        rationales = self._pad(
            [r.prompt_ids + r.sampled_ids for r in rollouts],
            [len(r.sampled_ids) for r in rollouts],
            width,
        )
        answers = self._pad(
            [r.prompt_ids + r.rationale_ids + r.answer_ids for r in rollouts],
            [len(r.answer_ids) for r in rollouts],
            width + max(len(r.answer_ids) for r in rollouts),
        )
        advantage = self._advantage(rationales, answers)
        loss = torch.zeros((), device=self.model.device)
        order = torch.randperm(len(rollouts), generator=self._generator)
        for index in order.split(self._micro_batch):
            objective = advantage[index] * _sequence_logp(self.model, rationales[index])
            answer = _sequence_logp(self.model, answers[index])
            micro = -(objective + self._answer_weight * answer).sum() / len(rollouts)
            micro.backward()
            loss += micro.detach()
        return loss

    @torch.no_grad()
    def _advantage(self, rationales: _Rows, answers: _Rows) -> Tensor:
        """Compute each sequence's reward, less its KL, less its group's mean of the others: [B]."""
        logp, ref_logp, reward = [], [], []
        for start in range(0, len(rationales.scored), self._scoring_batch):
            batch = slice(start, start + self._scoring_batch)
            logp.append(_sequence_logp(self.model, rationales[batch]))
            ref_logp.append(_sequence_logp(self.ref_model, rationales[batch]))
            reward.append(_sequence_logp(self.model, answers[batch]))
        kl = torch.cat(logp) - torch.cat(ref_logp)
        K = self.problem.setting.K
        rewards = (torch.cat(reward) - self._beta * kl).view(-1, K)
        others = (rewards.sum(dim=1, keepdim=True) - rewards) / (K - 1)
        return (rewards - others).flatten()

    def _pad(self, rows: Sequence[Sequence[int]], scored: Sequence[int], width: int) -> _Rows:
        device = self.model.device
        missing = [width - len(row) for row in rows]
        padded = [[0] * n + list(row) for n, row in zip(missing, rows, strict=True)]
        return _Rows(
            torch.tensor(padded, device=device),
            torch.arange(width, device=device) >= torch.tensor(missing, device=device)[:, None],
            torch.tensor(scored, device=device),
        )


class PublishedRecipe(Published):
    """The published algorithm with the batches of its recipe: 48 sequences scored, 4 trained on."""

    name = "published (by fours)"

    def __init__(self, problem: StepProblem, folder: Path, one_batch: bool = False) -> None:
        super().__init__(problem, folder, one_batch=one_batch)


def _sequence_logp(model: PreTrainedModel, rows: _Rows) -> Tensor:
    """Sum the log-prob of the scored tokens of each row [B] in the model's dtype."""
    logits = model(
        input_ids=rows.input_ids,
        attention_mask=rows.mask,
        position_ids=rows.mask.cumsum(dim=1) - rows.mask.long(),
        use_cache=False,
        output_hidden_states=True,
    ).logits
    logp = torch.log_softmax(logits, dim=-1)
    del logits
    token_logp = logp[:, :-1].gather(2, rows.input_ids[:, 1:, None]).squeeze(2)
    del logp
    end = token_logp.shape[1]
    scored = torch.arange(end, device=token_logp.device) >= end - rows.scored[:, None]
    return (token_logp * scored).sum(dim=1)
