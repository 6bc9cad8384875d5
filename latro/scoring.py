"""Per-row log-probs of a causal language model: trunk once, then the fused head.

The model's own forward would make logits of every position. Here the trunk runs alone, the hidden
states of the head rows are gathered, and `linear_logprob` takes them through the head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from latro.layout import Batch
from latro_kernels import linear_logprob


@dataclass(frozen=True)
class Scores:
    """Of N head rows, in fp32."""

    logp: Tensor
    """[N], log-probability of each row's target; differentiable where the model is."""
    entropy: Tensor
    """[N], in nats; detached."""


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

    def __call__(self, batch: Batch) -> Scores:
        """Log-prob and entropy of every head row of a batch."""
        hidden = self.trunk(batch.input_ids)
        return self.head(hidden.flatten(0, 1)[batch.positions], batch.target)

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

    @torch.no_grad()
    def _verify(self) -> None:
        """Compare with the model's own logits once: a wrong scale would train in silence."""
        was_training = self.model.training
        self.model.eval()
        vocab = self.model.get_output_embeddings().weight.shape[0]
        ids = torch.arange(1, 9, device=self.model.device)[None] % vocab
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
