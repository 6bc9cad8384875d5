"""Forwards that compute log-probs at chosen rows or sample there, installed beside a model's own.

A causal language model's own forward makes logits of every position. `install_head_rows` gives the
model and its head forwards that take one more keyword, `head_rows`. Without it they are the old
forwards, and `generate` and everything else are untouched. With it, the model's forward runs the
trunk, gathers the hidden states of the head rows, and calls its head with them; the head's forward
runs `linear_logprob`, and `linear_kl` where there is a reference, on its own weight; in decoding it
runs `linear_sample`.

Both are calls of modules, as engines expect them (DDP, FSDP2, DeepSpeed, PEFT): gradients are
exchanged and sharded weights are gathered by hooks on these calls.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from latro.model.adapters import head_parameters
from latro.model.attention import row_arguments
from latro.model.decoding import DecodingKeys
from latro.model.forwards import replace_forward
from latro.model.packing import Batch
from latro.model.shared_prefix import SharedPrefix
from latro_kernels import LinearSample, linear_kl, linear_logprob, linear_sample
from latro_kernels.integrations.logits import LogitForm, trunk_of

HEAD_BUDGET = 512 * 2**20
"""Bytes of products that the head's forward may keep for its backward: the trunk keeps more."""


@dataclass(frozen=True, eq=False)
class Reference:
    """The reference model π_0 at N head rows, for an exact KL."""

    hidden: Tensor
    """[N, H], without gradient."""
    weight: Tensor
    """[V, H], of its head, without gradient."""
    bias: Tensor | None
    """[V], of its head, without gradient."""


class Returned:
    """Holds what a head returned. It is no dataclass: FSDP2 would hand the head a copy of one."""

    def __init__(self) -> None:
        self.tensors: tuple[Tensor, ...] = ()


@dataclass(frozen=True, eq=False)
class HeadRows:
    """Asks a model's forward for (logp, entropy[, row_kl]) at the N head rows of a batch.

    Each is fp32 [N] in nats. The forward returns a tuple, because engines look for the tensors in
    what a forward returns.
    """

    batch: Batch
    form: LogitForm
    """How the model comes from its hidden states to its logits."""
    temperature: float
    """The logits are divided by it."""
    backend: str
    """The backend of `linear_logprob` and `linear_kl`."""
    entropy_gradient: bool = False
    """Whether the entropy has a gradient."""
    reference: Reference | None = None
    """π_0 at the same rows, where their KL to it is wanted."""
    own: Returned = field(default_factory=Returned)
    """Where the head leaves what it returns, which an engine may cast."""


@dataclass(frozen=True, eq=False)
class ReferenceRows:
    """Asks a model's forward for a `Reference` at the head rows of a batch."""

    batch: Batch
    form: LogitForm
    """How the model comes from its hidden states to its logits."""
    copies: bool
    """Whether to copy the head's weight, because an engine drops it after the head's forward."""


@dataclass(frozen=True, eq=False)
class Reading:
    """Tokens that go through the trunk while rows are decoded, whose keys `keys` keeps."""

    input_ids: Tensor
    """int64 [1, T]."""
    keys: DecodingKeys
    """Of the prompts and rows."""
    prompts: SharedPrefix | None = None
    """The segments, where the tokens are prompts; else each is the next token of a row."""
    trunk: Callable[..., Tensor] | None = None
    """Makes their hidden states [T, H] of what a trunk is given; None: the model's own trunk."""


@dataclass(frozen=True, eq=False)
class SampledRows:
    """Asks a model's forward for a `LinearSample` of N tokens, each behind one that is read."""

    reading: Reading
    form: LogitForm
    """How the model comes from its hidden states to its logits."""
    temperature: float
    """The logits are divided by it; 0: the likeliest token."""
    backend: str
    """The backend of `linear_sample`."""
    seed: Tensor
    """int64 [N], of each row's random numbers."""
    number: Tensor
    """int64 [N], how many tokens were sampled with the row's seed before."""
    positions: Tensor | None = None
    """int64 [N], which of the T tokens each is sampled behind; None: every one."""
    head: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    """The head's weight and bias, once they are known: making them takes an adapter's product, or
    under autocast a cast of them all."""


Request = HeadRows | ReferenceRows | SampledRows


def install_head_rows(causal: PreTrainedModel) -> None:
    """Let the forwards of `causal` and of its head take `head_rows`, once."""
    _install(causal, _model_forward())
    _install(causal.get_output_embeddings(), _head_forward())


def _install(module: Any, forward: Any) -> None:
    """Make `forward`, a function of its own for each module, the forward of `module`.

    The signature that it shows is that of the old forward and `head_rows`, because `generate` and
    the Trainer read from it what a model takes.
    """
    if not replace_forward(module, forward, own="_forward_without_rows"):
        return
    own = inspect.signature(module._forward_without_rows)
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    parameters += own.parameters.values()
    keyword = inspect.Parameter("head_rows", inspect.Parameter.KEYWORD_ONLY, default=None)
    has_kwargs = parameters[-1].kind == inspect.Parameter.VAR_KEYWORD
    parameters.insert(len(parameters) - has_kwargs, keyword)
    forward.__signature__ = own.replace(parameters=parameters)


def _model_forward() -> Callable[..., Any]:
    def forward(self: Any, *args: Any, head_rows: Request | None = None, **kwargs: Any) -> Any:
        if head_rows is None:
            return self._forward_without_rows(*args, **kwargs)
        if isinstance(head_rows, SampledRows):
            hidden = read(self, head_rows.reading)
            if head_rows.positions is not None:
                hidden = hidden[head_rows.positions]
        else:
            hidden = trunk_rows(self, head_rows.batch)
        if head_rows.form.hidden_scale != 1.0:
            hidden = hidden * head_rows.form.hidden_scale
        return self.get_output_embeddings()(hidden, head_rows=head_rows)

    return forward


def _head_forward() -> Callable[..., Any]:
    def forward(self: Any, *args: Any, head_rows: Request | None = None, **kwargs: Any) -> Any:
        if head_rows is None:
            return self._forward_without_rows(*args, **kwargs)
        (hidden,) = args
        if isinstance(head_rows, SampledRows):
            return _sample(self, hidden, head_rows)
        weight, bias = head_parameters(self)
        if isinstance(head_rows, ReferenceRows):
            weight, bias = weight.detach(), None if bias is None else bias.detach()
            if head_rows.copies:
                weight, bias = weight.clone(), None if bias is None else bias.clone()
            return Reference(hidden, weight, bias)
        reference = head_rows.reference
        settings: dict[str, Any] = {
            **head_rows.form.kernel_settings(head_rows.temperature),
            "backend": head_rows.backend,
        }
        logp, entropy = linear_logprob(
            hidden,
            weight,
            head_rows.batch.target,
            bias=bias,
            return_entropy=True,
            memory_budget=HEAD_BUDGET,
            **settings,
        )
        returned: tuple[Tensor, ...] = (
            logp,
            entropy if head_rows.entropy_gradient else entropy.detach(),
        )
        if reference is not None:
            row_kl = linear_kl(
                hidden,
                weight,
                reference.hidden,
                reference.weight,
                bias_p=bias,
                bias_q=reference.bias,
                **settings,
            )
            returned += (row_kl,)
        head_rows.own.tensors = returned
        return returned

    return forward


def _sample(head: Any, hidden: Tensor, rows: SampledRows) -> LinearSample:
    """Sample a token behind each of the hidden states [N, H]."""
    if not rows.head:
        rows.head.append(_cast(*head_parameters(head)))
    ((weight, bias),) = rows.head
    return linear_sample(
        hidden,
        weight,
        rows.seed,
        rows.number,
        bias=bias,
        backend=rows.backend,
        **rows.form.kernel_settings(rows.temperature),
    )


def _cast(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return a head's weight and bias as `linear` takes them under autocast."""
    kind = weight.device.type
    if not torch.is_autocast_enabled(kind):
        return weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def trunk_rows(causal: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the hidden states [N, H] of a batch's head rows, after the trunk's final norm.

    A padded batch has no attention mask: padding stands at the right, where causal attention never
    looks, and every model then takes its plain causal path.
    """
    packing = {} if batch.shared_prefix is None else row_arguments(batch.shared_prefix)
    trunk = trunk_of(causal)
    hidden = trunk(input_ids=batch.input_ids, use_cache=False, **packing).last_hidden_state
    return hidden.flatten(0, 1)[batch.positions]


def read(causal: PreTrainedModel, reading: Reading) -> Tensor:
    """Return the hidden states [T, H] of tokens in decoding, after the trunk's final norm."""
    inputs = {
        "input_ids": reading.input_ids,
        "use_cache": False,
        **row_arguments(reading.prompts, reading.keys),
    }
    if reading.trunk is not None:
        return reading.trunk(**inputs)
    hidden: Tensor = trunk_of(causal)(**inputs).last_hidden_state[0]
    return hidden
