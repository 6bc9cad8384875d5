"""Causal language models of Transformers whose loss takes no logits.

    model = fused_head(AutoModelForCausalLM.from_pretrained(...))
    loss = model(input_ids, labels=labels).loss
    logp = model.logprobs(input_ids)

The model's own forward runs, with all that it does beside the loss, such as MoE's router loss. Only
its head does another thing where there are labels: it scores them by `linear_logprob` and returns
logits [B, T, 0], to which a scale and a softcap do nothing; the model's loss is then made of the
scores. Both are calls of modules, as engines expect them: sharded weights are gathered by hooks on
the head's call. Without labels model and head are as they were, and so is `generate`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pickle import PicklingError
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from latro_kernels.integrations.logits import LogitForm, adds_to, layers_gathered, logit_form
from latro_kernels.linear_logprob import linear_logprob


@dataclass(eq=False)
class _Asked:
    """What the head is to score while a forward runs, and the scores."""

    labels: Tensor
    """[B, T] int64: the token that each position is to predict."""
    ignore_index: int
    temperature: float = 1.0
    return_entropy: bool = False
    logp: Tensor | None = None
    """[B, T] fp32, nats; 0 where the label is ignored."""
    entropy: Tensor | None = None


@dataclass(eq=False)
class _Fused:
    """What a model with a fused head remembers."""

    head: nn.Module
    form: LogitForm
    before: tuple[dict[str, Any], dict[str, Any]]
    """The attributes of model and head that are replaced, as far as they were there."""
    asked: _Asked | None = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be pickled: what lies in the model's forwards would not come back."""
        raise PicklingError(
            "model: a model with a fused head cannot be pickled; save it with save_pretrained, or "
            "call unfused_head(model) first"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> _Fused:
        """Return what a copy of the model remembers."""
        copied = memo[id(self)] = object.__new__(_Fused)
        vars(copied).update(deepcopy(vars(self), memo))
        return copied


def fused_head(model: PreTrainedModel) -> PreTrainedModel:
    """Let `model` compute its loss without logits, and give it `logprobs`.

    `model(input_ids, labels=...)` returns the loss that it returned before, up to rounding, and
    None for logits. `model.logprobs` is `logprobs` of this module. Call it before PEFT or an engine
    wraps the model; a second call does nothing. `copy.deepcopy` copies the fused head too; pickle,
    and so `torch.save` of a whole model, refuses it.

    Returns:
        model itself.

    Raises:
        TypeError: not a model of Transformers.
        ValueError: a model without a head, with an adapter on it, with another loss than that of
            causal language models, whose logits are not softcap(head(trunk(x)) · scale), or whose
            forward does not make its loss by `self.loss_function`.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a PreTrainedModel, got {type(model).__name__}")
    if "_fused_head" in vars(model):
        return model
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"model: expected one with a head, got {type(model).__name__}")
    if adds_to(head):
        raise ValueError(
            "model: expected a head without an adapter, which would not be taken into account, got "
            f"{type(head).__name__}; leave the head out of target_modules, or merge the adapter"
        )
    if model.loss_function is not ForCausalLMLoss:
        raise ValueError(
            f"model: expected the loss of causal language models, got {model.loss_function}"
        )
    with _evaluation(model), layers_gathered(model):
        form = logit_form(model)
        _check_loss(model)
    before = (_kept(model, "forward", "_loss_function"), _kept(head, "forward"))
    forward, own = _model_forward(), model.forward
    signature = inspect.signature(type(model).forward)
    forward.__signature__ = signature  # type: ignore[attr-defined]
    model._own_forward, head._own_forward = own, head.forward
    model._fused_head = head._fused_head = _Fused(head, form, before)
    model.forward = MethodType(forward, model)
    head.forward = MethodType(_head_forward, head)
    model.loss_function = MethodType(_loss, model)
    model.logprobs = MethodType(logprobs, model)
    return model


def unfused_head(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `fused_head`, and return the model itself."""
    if "_fused_head" not in vars(model):
        return model
    fused: _Fused = model._fused_head
    ours = ("_fused_head", "_own_forward", "forward")
    for module, kept in zip((model, fused.head), fused.before, strict=True):
        for name in ours:
            delattr(module, name)
        vars(module).update(kept)
    del model.logprobs
    if "_loss_function" not in fused.before[0]:
        del model._loss_function
    return model


def logprobs(
    self: Any,
    input_ids: Tensor,
    *,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    return_entropy: bool = False,
    **inputs: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the log-probability of each token after those before it, without logits.

    It is, up to rounding,

        log_p = torch.log_softmax(model(input_ids).logits[:, :-1].float() / temperature, -1)
        logp = log_p.gather(2, input_ids[:, 1:, None]).squeeze(2)

    Args:
        self: the model.
        input_ids: [B, T] int64.
        labels: [B, T] int64, unshifted, with −100 where no token is to be scored; None for all of
            `input_ids` that an attention mask [B, T] does not leave out, but for the first of a
            row behind padding at its left, before which there is no token.
        temperature: divides the logits.
        return_entropy: whether to return the distributions' entropy too.
        inputs: what else the model's forward takes, such as `attention_mask`.

    Returns:
        logp [B, T − 1], fp32, nats, 0 where no token is scored; with `return_entropy` the pair
        logp, entropy.
    """
    if labels is None:
        labels, mask = input_ids, inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == input_ids.shape:
            # A position predicts only where it is a token itself.
            predicted = (mask != 0) & nn.functional.pad(mask != 0, (1, 0))[:, :-1]
            labels = input_ids.masked_fill(~predicted, -100)
    asked = _Asked(_shifted(labels, -100), -100, temperature, return_entropy)
    with _scoring(self, asked):
        # The sum is 0, and lets hooks on the head's output see a gradient.
        zero = self(input_ids=input_ids, **({"use_cache": False} | inputs)).logits.sum()
    assert asked.logp is not None
    logp = asked.logp[:, :-1] + zero
    return logp if asked.entropy is None else (logp, asked.entropy[:, :-1])


@contextmanager
def _scoring(model: Any, asked: _Asked) -> Iterator[None]:
    """Let the head of `model` score what is asked in the forward that runs within the block."""
    fused: _Fused = model._fused_head
    if model.get_output_embeddings() is not fused.head:
        raise ValueError(
            "model: expected the head that fused_head saw, got another one; resize it before, and "
            "leave it out of an adapter's modules"
        )
    fused.asked = asked
    try:
        yield
        if asked.logp is None:
            raise RuntimeError(f"{type(model).__name__} did not call its head")
    finally:
        fused.asked = None


def _model_forward() -> Callable[..., Any]:
    """Return a function of its own for each model, as it bears the model's signature."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        fused: _Fused = self._fused_head
        given = inspect.signature(self._own_forward).bind(*args, **kwargs).arguments
        labels = given.get("labels", kwargs.get("labels"))
        keep = given.get("logits_to_keep", 0)
        if labels is None or fused.asked is not None or not isinstance(keep, int) or keep != 0:
            return self._own_forward(*args, **kwargs)
        ignore_index = kwargs.get("ignore_index", -100)
        shifted = kwargs.get("shift_labels")
        if shifted is None:
            shifted = _shifted(labels, ignore_index)
        with _scoring(self, _Asked(shifted, ignore_index)):
            output = self._own_forward(*args, **kwargs)
        if isinstance(output, tuple):
            return output
        # None, and not [B, T, 0], so that nobody reads logits that are not there.
        return type(output)(**{k: v for k, v in output.items() if k != "logits"})

    return forward


def _head_forward(self: Any, hidden: Tensor, **keywords: Any) -> Any:
    """Return logits, or score the labels that are asked for and return logits [B, T, 0]."""
    fused: _Fused = self._fused_head
    asked = fused.asked
    if asked is None:
        # Keywords are for a forward that another library had put there before.
        return self._own_forward(hidden, **keywords)
    scores = linear_logprob(
        hidden,
        self.weight,
        asked.labels.to(hidden.device),
        bias=getattr(self, "bias", None),
        ignore_index=asked.ignore_index,
        return_entropy=asked.return_entropy,
        **fused.form.kernel_settings(asked.temperature),
    )
    asked.logp, asked.entropy = scores if isinstance(scores, tuple) else (scores, None)
    # No view: what comes behind the head may work in place.
    return asked.logp[..., None][..., :0].clone()


def _loss(
    self: Any,
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    **kwargs: Any,
) -> Tensor:
    """Return what Transformers' `ForCausalLMLoss` returns, from the scores where there are some."""
    asked = self._fused_head.asked
    if asked is None or asked.logp is None:
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, **kwargs)
    count = num_items_in_batch
    if count is None:
        count = (asked.labels != asked.ignore_index).sum()
    if isinstance(count, Tensor):
        count = count.to(asked.logp.device)
    # The sum of no logits is 0, and lets hooks on the head's output see a gradient.
    return -asked.logp.sum() / count + logits.sum()


def _shifted(labels: Tensor, ignore_index: int) -> Tensor:
    """Return the token that each position is to predict, none at the last."""
    return nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def _kept(module: nn.Module, *names: str) -> dict[str, Any]:
    return {name: vars(module)[name] for name in names if name in vars(module)}


@contextmanager
def _evaluation(model: PreTrainedModel) -> Iterator[None]:
    """Put `model` in evaluation mode, and each module in its own again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def _check_loss(model: PreTrainedModel) -> None:
    """Raise if the forward makes its loss in another way than by calling `loss_function`."""
    made = []

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        made.append(ForCausalLMLoss(*args, **kwargs))
        return made[-1]

    before = _kept(model, "_loss_function")
    model.loss_function = recorded
    try:
        ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
        model.forward(input_ids=ids, labels=ids, use_cache=False)
    finally:
        del model._loss_function
        vars(model).update(before)
    if not made:
        raise ValueError(
            f"model: {type(model).__name__} does not make its loss by self.loss_function, as "
            "Transformers 5's models do"
        )
