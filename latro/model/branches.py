"""Log-probs of continuations of prompts, with every prompt once through the trunk.

K completions of a prompt are usually scored padded, each with its own copy of the prompt, which is
K·(P + C) positions for prompts of P tokens and completions of C. A packed row has the prompt once
and its branches after it, P + K·C positions, and the log-probs are the same: see
`latro.model.attention`.

    scorer = BranchScorer(model)
    logp, entropy = scorer([prompt], [[branch, another_branch]])
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel

from latro.model.adapters import without_wrapper
from latro.model.attention import allow_shared_prefix
from latro.model.head_rows import install_head_rows
from latro.model.scoring import Scorer
from latro.rollout.sequences import Rollout

Ids = Sequence[int]


class BranchScorer:
    """Scores branches, which are continuations of prompts, with a causal language model.

    The model's forward, its logits and its weights stay as they are for everything else; its
    attention becomes one that takes packed rows too, and is its own without one.

    Args:
        model: any causal language model whose attention can share a prefix, PEFT's adapters
            included. Make the scorer before an engine wraps the model.
        temperature: logits are divided by it.
        backend: of `latro_kernels.linear_logprob`.

    Raises:
        ValueError: the model cannot share a prefix, or its logits are made in a way that
            `latro.model.scoring.Scorer` does not follow.
    """

    def __init__(
        self, model: PreTrainedModel, *, temperature: float = 1.0, backend: str = "auto"
    ) -> None:
        self._scorer = Scorer(model, temperature=temperature, backend=backend)
        self._scorer.entropy_gradient = True
        if self._scorer.why_not_packed is not None:
            raise ValueError(
                f"model: expected one whose sequences can share a prefix, got "
                f"{type(model).__name__}: {self._scorer.why_not_packed}"
            )

    def of_another(self, model: PreTrainedModel) -> BranchScorer:
        """Return a scorer of another model of the same architecture, which is not checked again."""
        other = copy.copy(self)
        other._scorer = copy.copy(self._scorer)
        other._scorer.model = model
        other._scorer.causal = without_wrapper(model)
        install_head_rows(other._scorer.causal)
        allow_shared_prefix(other._scorer.causal)
        return other

    def __call__(
        self,
        prompts: Sequence[Ids],
        branches: Sequence[Sequence[Ids]],
        *,
        caller: nn.Module | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the log-prob of every token of the branches, and the entropy in its place.

        This is, up to rounding and without the logits,

            for prompt, group in zip(prompts, branches):
                for branch in group:
                    logits = model(tensor([prompt + branch])).logits[0, len(prompt) - 1 : -1]
                    logp.append((logits / temperature).log_softmax(-1).gather(1, branch))

        Args:
            prompts: token ids, each at least one; no padding.
            branches: for each prompt the token ids of its branches, which may be empty.
            caller: what is called in the model's place, such as DDP's wrapper around it; None: the
                model.

        Returns:
            Two tensors, fp32 [N] in nats, with N the number of tokens of all branches, in their
            order; both are differentiable.

        Raises:
            ValueError: there is no branch, there are not as many groups as prompts, or a prompt is
                empty.
        """
        groups = [
            [_scored(prompt, branch) for branch in group]
            for prompt, group in zip(prompts, _checked(prompts, branches), strict=True)
            if group
        ]
        batch = self._scorer.collate(groups)
        self._scorer.caller = self._scorer.model if caller is None else caller
        scores = self._scorer(batch)
        return scores.logp, scores.entropy


def _scored(prompt: Ids, branch: Ids) -> Rollout:
    """Return a rollout all of whose branch is scored: a plain answer."""
    return Rollout(list(prompt), [], list(branch), answer_start=0, finished=True, plain=True)


def _checked(prompts: Sequence[Ids], branches: Sequence[Sequence[Ids]]) -> Sequence[Sequence[Ids]]:
    if len(prompts) != len(branches):
        raise ValueError(
            f"branches: expected a group for each of {len(prompts)} prompts, got {len(branches)}"
        )
    if not any(branches):
        raise ValueError("branches: expected at least one, got none")
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompts: expected at least one token in each, got none in {index}")
    return branches
