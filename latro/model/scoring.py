"""Log-probs of a causal language model at the head rows of a batch, and what is checked for them.

`latro.model.head_rows` has the forwards that compute them, and `latro.model.packing` the batches.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from latro.model.adapters import without_wrapper
from latro.model.attention import allow_shared_prefix, give_attention_back, shares_prefix
from latro.model.forwards import evaluation_mode
from latro.model.head_rows import (
    HeadRows,
    Reference,
    ReferenceRows,
    install_head_rows,
    trunk_rows,
)
from latro.model.packing import Batch, Group, collate
from latro.model.sampling_form import (
    hidden_difference,
    nan_tokens,
    sampling_form,
    without_tf32,
)
from latro.rollout.long_rope import long_rope_boundary
from latro.rollout.sequences import Rollout
from latro_kernels.integrations.logits import logit_form, whole_shape

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scores:
    """Log-prob, entropy and KL at N head rows, in fp32."""

    logp: Tensor
    """[N], log-probability of each row's target, in nats; differentiable where the model is."""
    entropy: Tensor
    """[N], in nats; differentiable where the scorer's `entropy_gradient` says so."""
    row_kl: Tensor | None = None
    """[N], in nats, KL to the reference at each row, where one was given; differentiable."""


class Scorer:
    """Scores head rows with a model's own trunk, head, logit scale and softcap.

    Args:
        model: any causal language model whose logits are head(trunk(x)), scaled or softcapped.
        temperature: logits are divided by it, as in sampling.
        backend: of `latro_kernels.linear_logprob`.

    Attributes:
        caller: what is called in the model's place: set to the engine's wrapper where there is one.
        entropy_gradient: set where a loss has a use for the entropies' gradient.
        sharded: set where an engine keeps the weights in shards that are gathered for a forward.
        packed: whether batches are packed, each prompt once for its branches. False, with a
            warning, where the model's attention cannot do that.
        why_not_packed: what its attention cannot do; None where it can.
        boundary: tokens up to which a LongRoPE model takes its short frequencies; else None.

    Raises:
        ValueError: the model has no linear head, its logits are not finite, or it computes them in
            a way that this class does not follow.
    """

    def __init__(
        self, model: PreTrainedModel, *, temperature: float = 1.0, backend: str = "auto"
    ) -> None:
        self.model = model
        self.caller: nn.Module = model
        self.entropy_gradient = False
        self.sharded = False
        # PEFT's wrapper hands the arguments of its forward on.
        self.causal = without_wrapper(model)
        self.temperature = temperature
        self.backend = backend
        head = self.causal.get_output_embeddings()
        if not isinstance(head, nn.Module) or getattr(head, "weight", None) is None:
            raise ValueError(
                f"model: expected a causal language model with a linear head, got "
                f"{type(model).__name__}"
            )
        install_head_rows(self.causal)
        self.boundary = long_rope_boundary(model)
        with without_tf32(), evaluation_mode(model):
            self.logit_form = logit_form(self.causal)
            self._verify_logits()
            shared_before = shares_prefix(self.causal)
            self.why_not_packed = self._why_not_packed()
        if self.why_not_packed is not None and not shared_before:
            give_attention_back(self.causal)
        # For whoever samples with the model once an engine has taken it over.
        sampling_form(self.causal)
        self.packed = self.why_not_packed is None
        if not self.packed:
            logger.warning(
                "%s cannot attend to a prefix that sequences share (%s); each goes through it with "
                "its own copy of the prompt, padded",
                type(model).__name__,
                self.why_not_packed,
            )

    def collate(self, groups: Sequence[Group]) -> Batch:
        """Return a batch of the rollouts of `groups`, packed or padded, on the model's device."""
        return collate(groups, self.model.device, packed=self.packed)

    def __call__(self, batch: Batch, reference: Reference | None = None) -> Scores:
        """Return log-prob and entropy at every head row of a batch, and its KL to `reference`."""
        rows = self._rows(batch, reference)
        returned = self.caller(input_ids=batch.input_ids, head_rows=rows)
        own = rows.own.tensors
        if returned[0].dtype != own[0].dtype:
            # FSDP2 casts what modules return under mixed precision. Sums of none of it are 0, and
            # let its hooks on what was returned see a gradient.
            returned = [x + cast[:0].sum() for x, cast in zip(own, returned, strict=True)]
        return Scores(*returned)

    def _rows(self, batch: Batch, reference: Reference | None = None) -> HeadRows:
        return HeadRows(
            batch,
            self.logit_form,
            temperature=self.temperature,
            backend=self.backend,
            entropy_gradient=self.entropy_gradient,
            reference=reference,
        )

    @torch.no_grad()
    def reference(self, batch: Batch) -> Reference:
        """Return this model at the head rows of a batch, for another model's exact KL to it."""
        # A weight that is gathered for the head's forward is gone after it.
        rows = ReferenceRows(batch, self.logit_form, copies=self.sharded)
        return self.caller(input_ids=batch.input_ids, head_rows=rows)

    def check_comparable(self, other: Scorer, *, exact: bool) -> None:
        """Check that the KL to another model has a meaning; `exact`: over the whole vocabulary.

        Raises:
            ValueError: the models do not share a vocabulary, or make their logits differently.
        """
        if other.vocab_size < self.vocab_size:
            raise ValueError(
                f"ref_model: expected the {self.vocab_size} tokens of the policy, got a head of "
                f"{other.vocab_size}"
            )
        if not exact:
            return
        for name, ours, theirs in (
            ("vocabulary", self.vocab_size, other.vocab_size),
            ("logit softcap", self.logit_form.softcap, other.logit_form.softcap),
            ("logit scale", self.logit_form.scale, other.logit_form.scale),
        ):
            if ours != theirs:
                raise ValueError(
                    f"ref_model: expected the {name} of the policy, {ours}, for an exact KL, "
                    f"got {theirs}"
                )

    @property
    def vocab_size(self) -> int:
        """V, the number of rows of the head's weight."""
        return whole_shape(self.causal.get_output_embeddings().weight)[0]

    # Checks of the model, once, in evaluation mode.

    @torch.no_grad()
    def _verify_logits(self) -> None:
        """Compare with the model's own logits once: a wrong scale would train in silence."""
        ids = torch.arange(1, 9, device=self.model.device)[None] % self.vocab_size
        own = self.model(input_ids=ids, use_cache=False).logits[0].float() / self.temperature
        if not torch.isfinite(own).all():
            raise ValueError(
                "model: its logits are not finite; the weights hold NaN or infinity, or overflow "
                f"in {self.model.dtype}"
            )
        own = own.log_softmax(-1)
        tokens = ids[0].tolist()
        rollout = Rollout(tokens, [], [], answer_start=0, finished=True)
        places = torch.arange(len(tokens), device=ids.device)
        # Every token at every position.
        batch = replace(
            collate([[rollout]], ids.device, packed=False),
            positions=places.repeat_interleave(len(tokens)),
            target=ids[0].repeat(len(tokens)),
        )
        # Not through hooks, as somebody's own may change what the model returns.
        logp, _ = self.causal.forward(head_rows=self._rows(batch))
        ours = logp.view(len(tokens), -1)
        # Low precision rounds the model's logits, not ours; a wrong formula is off by far more.
        allowed = 1e-3 if self.model.dtype == torch.float32 else 0.25
        # A temperature below 1 multiplies logits with their rounding.
        allowed /= min(1.0, self.temperature)
        error = (own[:, ids[0]] - ours).abs().max().item()
        if error > allowed:
            raise ValueError(
                f"model: {type(self.model).__name__} does not compute its logits as "
                f"softcap(head(trunk(x))·scale): log-probs differ by {error:.3g}"
            )

    @torch.no_grad()
    def _why_not_packed(self) -> str | None:
        """Compare hidden states of a packed batch with those of the same sequences padded.

        Return None where they agree, and else what is the matter.
        """
        if not allow_shared_prefix(self.causal):
            return "its attention cannot be replaced"
        tokens = [i % self.vocab_size for i in range(1, 15)]
        x, y = tokens[:5], tokens[5:7]
        groups = [
            [
                Rollout(prompt, z, y, answer_start=len(z), finished=True)
                for z in (tokens[7:10], [], tokens[8:14])
            ]
            for prompt in (x, x[::-1])
        ]
        packed, padded = (collate(groups, self.model.device, packed=p) for p in (True, False))
        # The first prompt's last branch is NaN, and left out of the comparison. It is not the first
        # branch, in whose row a layer with a state computes the prompt: by sums in which the later
        # tokens have the weight 0, and 0 · NaN is NaN.
        assert packed.shared_prefix is not None
        starts, rows = packed.shared_prefix.query_starts.tolist(), packed.offsets.tolist()
        others = [i for i in range(packed.num_rows) if not rows[4] <= i < rows[6]]
        try:
            with nan_tokens(self.causal, slice(starts[3], starts[4])):
                found = trunk_rows(self.causal, packed)[others]
            expected = trunk_rows(self.causal, padded)[others]
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, IndexError) as error:
            # A layer that knows no such thing, or that reads the mask; or a model that takes no
            # such keyword, or counts along the row positions of which it has not that many.
            return str(error).partition("\n")[0]
        return hidden_difference(found, expected, self.model.dtype)
