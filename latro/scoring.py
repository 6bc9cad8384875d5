"""Per-row log-probs of a causal language model: trunk once, then the fused head.

The model's own forward would make logits of every position. Here the trunk runs alone, the hidden
states of the head rows are gathered, and `linear_logprob` takes them through the head; `linear_kl`
takes them through two models' heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from latro.layout import Batch
from latro_kernels import linear_kl, linear_logprob


@dataclass(frozen=True)
class Scores:
    """Of N head rows, in fp32."""

    logp: Tensor
    """[N], log-probability of each row's target; differentiable where the model is."""
    entropy: Tensor
    """[N], in nats; detached."""
    row_kl: Tensor | None = None
    """[N], in nats, KL to the reference at each row, where one was given; differentiable."""


@dataclass(frozen=True)
class Reference:
    """π_0 at N head rows, for an exact KL."""

    scorer: Scorer
    hidden: Tensor
    """[N, H], without gradient."""


class Scorer:
    """Scores head rows with a model's own trunk, head, logit scale and softcap.

    Args:
        model: any causal language model whose logits are head(trunk(x)), scaled or softcapped.
        temperature: logits are divided by it, as in sampling.
        backend: of `latro_kernels.linear_logprob`.

    Raises:
        ValueError: the model has no linear head, its logits are not finite, or it computes them in
            a way that this class does not follow.
    """

    def __init__(
        self, model: PreTrainedModel, *, temperature: float = 1.0, backend: str = "auto"
    ) -> None:
        self.model = model
        self.temperature = temperature
        self.backend = backend
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Module) or getattr(head, "weight", None) is None:
            raise ValueError(
                f"model: expected a causal language model with a linear head, got "
                f"{type(model).__name__}"
            )
        config = model.config.get_text_config()
        self.softcap = getattr(config, "final_logit_softcapping", None)
        # Cohere multiplies its logits, Granite divides them.
        self.logit_scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        if self.softcap is not None and self.logit_scale != 1.0:
            raise ValueError(
                f"model: {type(model).__name__} has a logit softcap and a logit scale; their order "
                "is not known"
            )
        self._verify()

    def __call__(self, batch: Batch, reference: Reference | None = None) -> Scores:
        """Log-prob and entropy of every head row of a batch, and its KL to `reference`."""
        hidden = self.hidden(batch)
        scores = self.head(hidden, batch.target)
        if reference is None:
            return scores
        return replace(scores, row_kl=self.kl(hidden, reference))

    def hidden(self, batch: Batch) -> Tensor:
        """Hidden states [N, H] of the head rows of a batch."""
        return self.trunk(batch.input_ids).flatten(0, 1)[batch.positions]

    def trunk(self, input_ids: Tensor) -> Tensor:
        """Hidden states [B, T, H], after the final norm.

        There is no attention mask: padding stands at the right, where causal attention never
        looks, and every model then takes its plain causal path.
        """
        return self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state

    def head(self, hidden: Tensor, target: Tensor) -> Scores:
        """`linear_logprob` of hidden states [N, H], as the model computes its logits."""
        head = self.model.get_output_embeddings()
        logp, entropy = linear_logprob(
            hidden,
            head.weight,
            target,
            bias=getattr(head, "bias", None),
            temperature=self.temperature / self.logit_scale,
            softcap=self.softcap,
            return_entropy=True,
            backend=self.backend,
        )
        return Scores(logp, entropy.detach())

    def kl(self, hidden: Tensor, reference: Reference) -> Tensor:
        """KL(π ‖ π_0) [N] of the next token, exact, from hidden states [N, H]."""
        head, other = (s.model.get_output_embeddings() for s in (self, reference.scorer))
        # The two may share their head, and π_0's is constant.
        other_bias = getattr(other, "bias", None)
        return linear_kl(
            hidden,
            head.weight,
            reference.hidden,
            other.weight.detach(),
            bias_p=getattr(head, "bias", None),
            bias_q=None if other_bias is None else other_bias.detach(),
            temperature=self.temperature / self.logit_scale,
            softcap=self.softcap,
            backend=self.backend,
        )

    def check_comparable(self, other: Scorer) -> None:
        """Check that `kl` has a meaning.

        Raises:
            ValueError: the models do not share a vocabulary, or make their logits differently.
        """
        for name, ours, theirs in (
            ("vocabulary", self.vocab_size, other.vocab_size),
            ("logit softcap", self.softcap, other.softcap),
            ("logit scale", self.logit_scale, other.logit_scale),
        ):
            if ours != theirs:
                raise ValueError(
                    f"ref_model: expected the {name} of the policy, {ours}, for an exact KL, "
                    f"got {theirs}"
                )

    @property
    def vocab_size(self) -> int:
        """V, as the head has it."""
        return self.model.get_output_embeddings().weight.shape[0]

    @torch.no_grad()
    def _verify(self) -> None:
        """Compare with the model's own logits once: a wrong scale would train in silence."""
        was_training = self.model.training
        self.model.eval()
        ids = torch.arange(1, 9, device=self.model.device)[None] % self.vocab_size
        own = self.model(input_ids=ids, use_cache=False).logits[0].float() / self.temperature
        if not torch.isfinite(own).all():
            raise ValueError(
                "model: its logits are not finite; the weights hold NaN or infinity, or overflow "
                f"in {self.model.dtype}"
            )
        own = own.log_softmax(-1)
        ours = torch.stack(
            [
                self.head(self.trunk(ids)[0], torch.full_like(ids[0], token)).logp
                for token in ids[0].tolist()
            ],
            dim=1,
        )
        self.model.train(was_training)
        # Low precision rounds the model's logits, not ours; a wrong formula is off by far more.
        allowed = 1e-3 if self.model.dtype == torch.float32 else 0.25
        error = (own[:, ids[0]] - ours).abs().max().item()
        if error > allowed:
            raise ValueError(
                f"model: {type(self.model).__name__} does not compute its logits as "
                f"softcap(head(trunk(x))·scale): log-probs differ by {error:.3g}"
            )
