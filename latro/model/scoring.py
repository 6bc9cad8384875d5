"""Per-row log-probs of a causal language model: trunk once, then the fused head.

The model's own forward would make logits of every position. Here the trunk runs alone, the hidden
states of the head rows are gathered, and `linear_logprob` takes them through the head; `linear_kl`
takes them through two models' heads. All of that runs in the place of the model's forward and of
its head's, so that engines which wrap a model (DDP, FSDP2, DeepSpeed, PEFT) see the calls that they
expect: gradients are exchanged and sharded weights gathered as for any other forward.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from latro.model.adapters import head_parameters, without_wrapper
from latro.model.attention import allow_shared_prefix, placeholder_mask
from latro.model.logits import LogitForm, forward_replaced, logit_form, trunk_of
from latro.model.packing import Batch, Group, collate
from latro.rollout.long_rope import long_rope_boundary
from latro.rollout.sequences import Rollout
from latro_kernels import linear_kl, linear_logprob

logger = logging.getLogger(__name__)

T = TypeVar("T")

HEAD_BUDGET = 512 * 2**20
"""Bytes of products that the head's forward may keep for its backward: the trunk keeps more."""


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

    hidden: Tensor
    """[N, H], without gradient."""
    weight: Tensor
    """[V, H], of its head, without gradient."""
    bias: Tensor | None
    """[V], likewise."""


class Scorer:
    """Scores head rows with a model's own trunk, head, logit scale and softcap.

    Args:
        model: any causal language model whose logits are head(trunk(x)), scaled or softcapped.
        temperature: logits are divided by it, as in sampling.
        backend: of `latro_kernels.linear_logprob`.

    Attributes:
        caller: what is called in the model's place: set to the engine's wrapper where there is one.
        sharded: set where an engine keeps the weights in shards that are gathered for a forward.
        packed: whether batches are packed, each prompt once for its branches. False, with a
            warning, where the model's attention cannot do that.
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
        self.boundary = long_rope_boundary(model)
        with _without_tf32():
            self.logit_form = self._logit_form()
            self._verify_logits()
            why = self._why_not_packed()
        self.packed = why is None
        if not self.packed:
            logger.warning(
                "%s cannot attend to a prefix that sequences share (%s); each goes through it with "
                "its own copy of the prompt, padded",
                type(model).__name__,
                why,
            )

    def collate(self, groups: Sequence[Group]) -> Batch:
        """A batch of the rollouts of `groups`, packed or padded, on the model's device."""
        return collate(groups, self.model.device, packed=self.packed)

    def __call__(self, batch: Batch, reference: Reference | None = None) -> Scores:
        """Log-prob and entropy of every head row of a batch, and its KL to `reference`."""

        # A tuple, and not a `Scores`: engines look for the tensors in what a forward returns.
        def forward() -> tuple[Tensor, ...]:
            return self._at_head(self._hidden(batch), batch.target, reference)

        return Scores(*self._inside(batch, forward))

    @torch.no_grad()
    def reference(self, batch: Batch) -> Reference:
        """This model at the head rows of a batch, as another's exact KL wants it."""

        def forward() -> tuple[Tensor, ...]:
            def keep(head: nn.Module, hidden: Tensor) -> tuple[Tensor, ...]:
                weight, bias = head_parameters(head)
                parameters = [p.detach() for p in (weight, bias) if p is not None]
                # Gathered weights are gone after the head's forward.
                return (hidden, *(p.clone() if self.sharded else p for p in parameters))

            return self._call_head(self._hidden(batch), keep)

        hidden, weight, *bias = self._inside(batch, forward)
        return Reference(hidden, weight, bias[0] if bias else None)

    def trunk(self, batch: Batch) -> Tensor:
        """Hidden states [B, T, H], after the final norm.

        A padded batch has no attention mask: padding stands at the right, where causal attention
        never looks, and every model then takes its plain causal path.
        """
        packing: dict[str, Any] = {}
        if batch.shared_prefix is not None:
            packing = {
                "position_ids": batch.position_ids,
                "attention_mask": placeholder_mask(batch.input_ids.device),
                "shared_prefix": batch.shared_prefix,
            }
        trunk = trunk_of(self.causal)
        return trunk(input_ids=batch.input_ids, use_cache=False, **packing).last_hidden_state

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
        """V, as the head has it."""
        return self.causal.get_output_embeddings().weight.shape[0]

    # What runs in the place of forwards.

    def _inside(self, batch: Batch, function: Callable[[], T]) -> T:
        """The result of `function`, run as the model's forward, called through the engine."""
        with forward_replaced(self.causal, lambda *_, **__: function()):
            return self.caller(input_ids=batch.input_ids)

    def _hidden(self, batch: Batch) -> Tensor:
        """Hidden states [N, H] of the head rows of a batch."""
        return self.trunk(batch).flatten(0, 1)[batch.positions]

    def _call_head(
        self, hidden: Tensor, function: Callable[[nn.Module, Tensor], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """`function(head, hidden)`, run as the head's forward, so that its weight is there."""
        head = self.causal.get_output_embeddings()
        if self.logit_form.hidden_scale != 1.0:
            hidden = hidden * self.logit_form.hidden_scale
        with forward_replaced(head, lambda h: function(head, h)):
            return head(hidden)

    def _at_head(
        self, hidden: Tensor, target: Tensor, reference: Reference | None = None
    ) -> tuple[Tensor, ...]:
        """(logp, entropy[, row_kl]) of hidden states [N, H], as the model computes its logits."""

        def forward(head: nn.Module, hidden: Tensor) -> tuple[Tensor, ...]:
            weight, bias = head_parameters(head)
            form = self.logit_form
            settings: dict[str, Any] = {
                # c·tanh(s·a/c)/T, which the kernels know as (c/s)·tanh(a/(c/s)) / (T/s).
                "temperature": self.temperature / form.scale,
                "softcap": None if form.softcap is None else form.softcap / form.scale,
                "backend": self.backend,
            }
            logp, entropy = linear_logprob(
                hidden,
                weight,
                target,
                bias=bias,
                return_entropy=True,
                memory_budget=HEAD_BUDGET,
                **settings,
            )
            if reference is None:
                return logp, entropy.detach()
            row_kl = linear_kl(
                hidden,
                weight,
                reference.hidden,
                reference.weight,
                bias_p=bias,
                bias_q=reference.bias,
                **settings,
            )
            return logp, entropy.detach(), row_kl

        return self._call_head(hidden, forward)

    # Checks of the model, once.

    def _logit_form(self) -> LogitForm:
        was_training = self.model.training
        self.model.eval()
        try:
            return logit_form(self.causal)
        finally:
            self.model.train(was_training)

    @torch.no_grad()
    def _verify_logits(self) -> None:
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
        hidden = trunk_of(self.causal)(input_ids=ids, use_cache=False).last_hidden_state[0]
        ours = torch.stack(
            [self._at_head(hidden, torch.full_like(ids[0], t))[0] for t in ids[0].tolist()],
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

    @torch.no_grad()
    def _why_not_packed(self) -> str | None:
        """Compare hidden states of a packed batch with those of the same sequences padded.

        None where they agree.
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
        was_training = self.model.training
        self.model.eval()
        try:
            packed, padded = (
                self._hidden(collate(groups, self.model.device, packed=packed)).float()
                for packed in (True, False)
            )
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError) as error:
            # A layer that knows no such thing, or that reads the mask; or a model that takes no
            # such keyword.
            return str(error).partition("\n")[0]
        finally:
            self.model.train(was_training)
        # Half the digits: rounding takes fewer, a token seen too many or too few takes more. Norms
        # and softmaxes are fp32 even in an fp64 model.
        eps = max(torch.finfo(dtype).eps for dtype in (self.model.dtype, torch.float32))
        allowed = eps**0.5 * padded.abs().max()
        difference = (packed - padded).abs().max()
        return None if difference <= allowed else f"its hidden states differ by {difference:.3g}"


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """TF32 has 10 of fp32's 23 bits, which a comparison would take for a wrong formula."""
    matmul: Any = torch.backends.cuda.matmul
    given = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = given
