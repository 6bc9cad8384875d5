"""The gradient of the answer's own likelihood, added to that of TRL's policy loss.

TRL maximises E_z[r(z)] by the score function alone. Where r is the policy's own likelihood of the
answer it depends on the weights directly too, and the whole gradient of LaTRO and VeriFree is

    ∇E_z[r] = E_z[ r(z)·∇log π(z|x) + ∇r(z) ]       r = log π(y|x⊕z), or π(y|x⊕z) for verifree

where the second term, weighted with λ, is that of the loss −λ/S Σ_s r_s over S completions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from latro.integrations.trl.images import image_inputs_of, image_rows
from latro.integrations.trl.reward import AnswerLikelihood, answer_rows, answer_value
from latro.integrations.trl.seam import check_seam


class AnswerGradient:
    """A mixin for TRL's `RLOOTrainer` and `GRPOTrainer`, in front of them among the bases.

        class Trainer(AnswerGradient, RLOOTrainer): ...

    The answers of a batch go through the policy once more, with gradient, and share the prompts
    that the batch has several completions of.

    Args:
        answer_weight: λ. The reward's weight in `args.reward_weights` is a factor of it.
        args, kwargs: the trainer's; one of its reward functions is an `AnswerLikelihood`.

    Raises:
        ValueError: there is no such reward, there are several, or it is rlpr, which has no such
            gradient.
        RuntimeError: this version of TRL has other trainers.
    """

    # What TRL's trainers have.
    accelerator: Any
    current_gradient_accumulation_steps: int
    loss_is_scaled_for_ga: bool
    model: nn.Module
    reward_funcs: list[Any]
    reward_weights: Tensor

    def __init__(self, *args: Any, answer_weight: float = 1.0, **kwargs: Any) -> None:
        trainer: Any = super()
        trainer.__init__(*args, **kwargs)
        check_seam(
            "AnswerGradient",
            self,
            _generate_and_score_completions="inputs",
            _compute_loss="model inputs",
        )
        functions = self.reward_funcs
        found = [i for i, f in enumerate(functions) if isinstance(f, AnswerLikelihood)]
        if len(found) != 1 or functions[found[0]].objective == "rlpr":
            raise ValueError(
                "reward_funcs: expected one AnswerLikelihood, of objective latro or verifree, for "
                f"AnswerGradient, got {[getattr(f, 'objective', f) for f in functions]}"
            )
        (index,) = found
        self.likelihood: AnswerLikelihood = functions[index]
        self.answer_weight = answer_weight * float(self.reward_weights[index])

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        trainer: Any = super()
        output = trainer._generate_and_score_completions(inputs)
        # TRL shuffles and splits lists as it does tensors.
        output["rollouts"] = self.likelihood.rollouts
        return output

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        trainer: Any = super()
        loss = trainer._compute_loss(model, inputs)
        answer_loss = self._answer_loss(model, inputs)
        if self.loss_is_scaled_for_ga and self.model.training:
            answer_loss = answer_loss / self.current_gradient_accumulation_steps
        return loss + self.answer_weight * answer_loss

    def _answer_loss(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """Return −1/S Σ_s r_s; a completion that is excluded has no part in the sum."""
        reward, rollouts = self.likelihood, inputs["rollouts"]
        images = image_inputs_of(inputs)
        if images is None:
            # Those of one prompt side by side.
            rollouts = sorted(rollouts, key=lambda rollout: rollout.prompt_ids)
            rows = reward.score(list(map(answer_rows, rollouts)), self.accelerator, model)
        else:
            rows = image_rows(self, model, list(map(answer_rows, rollouts)), images)
        value = answer_value(rows, reward.objective)
        counts = [rollout.finished or reward.unfinished == "floor" for rollout in rollouts]
        return -torch.where(torch.tensor(counts, device=value.device), value, 0).mean().float()
