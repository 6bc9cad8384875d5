"""TRL's per-token log-probs with every prompt once through the trunk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from latro.integrations.trl.seam import SCORES, check_seam
from latro.model.branches import BranchScorer
from latro.model.distribution import is_sharded


class SharedPrefix:
    """A mixin for TRL's `RLOOTrainer` and `GRPOTrainer`, in front of them among the bases.

        class Trainer(SharedPrefix, RLOOTrainer): ...

    Wherever the trainer scores completions (under the policy, with and without gradient, and under
    the reference), those of one prompt in a batch share it, so that K completions of C tokens take
    P + K·C positions in place of K·(P + C). The log-probs are TRL's, up to rounding.

    Raises:
        ValueError: the model cannot share a prefix, an engine shards the weights, or a setting of
            the trainer's asks for another head.
        RuntimeError: this version of TRL has other trainers.
    """

    # What TRL's trainers have.
    accelerator: Any
    args: Any
    aux_loss_enabled: bool
    model: Any
    ref_model: Any
    temperature: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        trainer: Any = super()
        trainer.__init__(*args, **kwargs)
        check_seam("SharedPrefix", self, _get_per_token_logps_and_entropies=SCORES)
        for name, refused in (
            ("router_aux_loss_coef", self.aux_loss_enabled),
            ("cast_lm_head_to_fp32", getattr(self.args, "cast_lm_head_to_fp32", False)),
        ):
            if refused:
                raise ValueError(f"{name}: expected none with SharedPrefix, which has no such head")
        if is_sharded(self.accelerator):
            raise ValueError(
                "SharedPrefix: expected whole weights in every process, got an engine that shards "
                "them; train by DDP or ZeRO-2, or leave it out"
            )
        self._policy_scorer = BranchScorer(self.model, temperature=self.temperature)
        self._reference_scorer = None
        if self.ref_model is not None:
            # DeepSpeed's engine, where it is one.
            reference = self.accelerator.unwrap_model(self.ref_model)
            self._reference_scorer = self._policy_scorer.of_another(reference)

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        given = sorted(name for name, value in images.items() if value is not None)
        if given:
            raise NotImplementedError(
                f"prompts: expected text for SharedPrefix, got prompts with {', '.join(given)}"
            )
        scorer = self._policy_scorer
        if self._reference_scorer is not None and model is self.ref_model:
            scorer = self._reference_scorer
        chunk = batch_size or len(input_ids)
        scores = []
        for ids, mask in zip(input_ids.split(chunk), attention_mask.split(chunk), strict=True):
            with self.accelerator.autocast():
                scores.append(_padded_scores(scorer, model, ids, mask, logits_to_keep))
        logps, entropies = (torch.cat(part) for part in zip(*scores, strict=True))
        return logps, entropies if compute_entropy else None, None


def _padded_scores(
    scorer: BranchScorer, model: nn.Module, ids: Tensor, mask: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies [B, width] of the last `width` tokens of each row.

    Where the mask is 0 they are 0.
    """
    prompts: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
    for row, (tokens, seen) in enumerate(zip(ids.tolist(), mask.tolist(), strict=True)):
        prompt = tuple(t for t, s in zip(tokens[:-width], seen[:-width], strict=True) if s)
        branch = [t for t, s in zip(tokens[-width:], seen[-width:], strict=True) if s]
        prompts.setdefault(prompt, []).append((row, branch))
    branches = [[branch for _, branch in group] for group in prompts.values()]
    scores = scorer(list(prompts), branches, caller=model)
    # Completions are padded at the right.
    places = [
        row * width + i
        for group in prompts.values()
        for row, branch in group
        for i in range(len(branch))
    ]
    index = torch.tensor(places, dtype=torch.int64, device=ids.device)
    logps, entropies = (
        score.new_zeros(len(ids) * width).index_put((index,), score).view(-1, width)
        for score in scores
    )
    return logps, entropies
