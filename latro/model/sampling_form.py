"""Which models can be asked for `SampledRows`, found out by trying.

Decoding with keys that lie in a `DecodingKeys` takes a model whose attention is replaced and knows
packed rows, and that keeps nothing else from token to token. Rather than a list of architectures
there is a trial: hidden states of a few tokens, decoded, are those of whole sequences. Models that
fail it are left to transformers' `generate`, and there is a trial of that too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from latro.model.adapters import without_wrapper
from latro.model.attention import allow_shared_prefix, give_attention_back, shares_prefix
from latro.model.decoding import DecodingKeys
from latro.model.forwards import allowed_difference, evaluation_mode
from latro.model.head_rows import Reading, install_head_rows, read
from latro.model.shared_prefix import SharedPrefix
from latro.rollout.sequences import Sample
from latro_kernels.integrations.logits import LogitForm, logit_form, trunk_of, whole_shape


@dataclass(frozen=True)
class SamplingForm:
    """What is to be known of a model that samples by `SampledRows`."""

    logits: LogitForm
    """How it comes from its hidden states to its logits."""
    bytes_per_token: int
    """The bytes of a token's keys and values in all layers."""


def sampling_form(causal: PreTrainedModel) -> SamplingForm | str:
    """Return how `causal` samples by `SampledRows`, or why it cannot; its forwards then take them.

    The answer is found once and kept on the model, because an engine that takes the model over does
    not let parts of it be called alone. So ask before.
    """
    if "_sampling_form" not in causal.__dict__:
        shared_before = shares_prefix(causal)
        with without_tf32(), evaluation_mode(causal):
            causal._sampling_form = _try(causal)
        if isinstance(causal._sampling_form, str) and not shared_before:
            give_attention_back(causal)
    return causal._sampling_form


def _try(causal: PreTrainedModel) -> SamplingForm | str:
    head = causal.get_output_embeddings()
    if not isinstance(head, nn.Module) or getattr(head, "weight", None) is None:
        return "it has no linear head"
    if not allow_shared_prefix(causal):
        return "its attention cannot be replaced"
    keys = DecodingKeys(causal.device)
    try:
        with torch.no_grad():
            if (why := _compare(causal, keys)) is not None:
                return why
        form = SamplingForm(logit_form(causal), keys.bytes_per_token)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        # A layer that knows no such thing, or that reads the mask; a model that takes no such
        # keyword, or that computes its logits in a way of its own.
        return str(error).partition("\n")[0]
    install_head_rows(causal)
    return form


def _compare(causal: PreTrainedModel, keys: DecodingKeys) -> str | None:
    """Compare decoded hidden states with those of whole sequences, by `hidden_difference`."""
    device = causal.device
    V, _ = whole_shape(causal.get_output_embeddings().weight)
    prompts = [[1, 2, 3, 4, 5], [6, 7, 8]]
    branches = [(0, [9, 10, 11]), (1, [12, 13, 14]), (0, [15, 16, 17])]
    prompts = [[i % V for i in prompt] for prompt in prompts]
    branches = [(prompt, [i % V for i in ids]) for prompt, ids in branches]
    decoded = torch.stack(list(_decoded(causal, keys, prompts, branches)), dim=1)

    width = max(len(prompts[prompt]) + len(ids) for prompt, ids in branches)
    whole = [prompts[prompt] + ids for prompt, ids in branches]
    ids = torch.tensor([row + [0] * (width - len(row)) for row in whole], device=device)
    hidden: Tensor = trunk_of(causal)(input_ids=ids, use_cache=False).last_hidden_state
    padded = torch.stack(
        [hidden[row, len(prompts[p]) : len(prompts[p]) + 3] for row, (p, _) in enumerate(branches)]
    )
    # But for the first branch, which `_decoded` makes NaN.
    return hidden_difference(decoded[1:], padded[1:], causal.dtype)


@contextlib.contextmanager
def nan_tokens(causal: PreTrainedModel, places: slice) -> Iterator[None]:
    """Make the embeddings of the tokens at some places of a row NaN within.

    What reads them becomes NaN too, in any precision: in bf16 the little that a layer lets through
    from one sequence to another might look like rounding.
    """

    def spoil(module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
        embedded = embedded.clone()
        embedded[:, places] = torch.nan
        return embedded

    handle = causal.get_input_embeddings().register_forward_hook(spoil)
    try:
        yield
    finally:
        handle.remove()


def hidden_difference(found: Tensor, padded: Tensor, dtype: torch.dtype) -> str | None:
    """Return None where a model's hidden states are those of padded sequences, else a sentence.

    Args:
        found: of the same tokens, on another way through the model, beside `nan_tokens`.
        padded: like `found`.
        dtype: the model's.
    """
    found, padded = found.float(), padded.float()
    if found.isnan().any():
        return "a layer reads tokens of other sequences"
    difference = (found - padded).abs().max()
    # A token seen too many or too few makes more of a difference.
    if difference <= allowed_difference(padded, dtype):
        return None
    return f"its hidden states differ by {difference:.3g}"


def _decoded(
    causal: PreTrainedModel,
    keys: DecodingKeys,
    prompts: list[list[int]],
    branches: list[tuple[int, list[int]]],
) -> Iterator[Tensor]:
    """Yield the hidden states [branches, H] of each step, tokens of all branches being given.

    Those of the first branch are NaN.
    """
    keys.place_prompts(range(len(prompts)), [len(prompt) for prompt in prompts])
    read(causal, prompts_reading(prompts, keys))
    for step in range(3):
        keys.set_rows(
            [prompt for prompt, _ in branches],
            [len(prompts[prompt]) for prompt, _ in branches],
            [step] * len(branches),
        )
        tokens = torch.tensor([[ids[step] for _, ids in branches]], device=keys.device)
        with nan_tokens(causal, slice(0, 1)):
            hidden = read(causal, Reading(tokens, keys))
        yield hidden


def prompts_reading(prompts: list[list[int]], keys: DecodingKeys) -> Reading:
    """Return the `Reading` of prompts, one after the other, that have their places in `keys`."""
    device = keys.device
    lengths = tuple(len(prompt) for prompt in prompts)
    return Reading(
        torch.tensor([[i for prompt in prompts for i in prompt]], device=device),
        keys,
        SharedPrefix(lengths, (-1,) * len(lengths), device),
    )


def check_generated(model: PreTrainedModel, generate: Callable[..., list[list[Sample]]]) -> None:
    """Raise ValueError where `generate` draws from something else than what is scored.

    A model may read padding, or count positions along the row: that the log-probs of a ragged batch
    are those of whole sequences is found by trying.

    Args:
        model: what is sampled from, with whole weights.
        generate: samples from it, by the keywords of `RolloutEngine.generate`.
    """
    name = type(without_wrapper(model)).__name__
    V, _ = whole_shape(model.get_input_embeddings().weight)
    prompts = [[i % V for i in prompt] for prompt in ([1, 2, 3, 4, 5], [6, 7])]
    try:
        samples = generate(prompts, num_samples=1, max_new_tokens=3, temperature=1.0, seeds=[0, 1])
        drawn = [sample for (sample,) in samples]
        rows = [prompt + sample.ids for prompt, sample in zip(prompts, drawn, strict=True)]
        wholes = [
            model(torch.tensor([row], device=model.device), use_cache=False, return_dict=True)
            for row in rows
        ]
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"model: expected one that transformers' generate samples from, got {name}, where it "
            f"fails: {str(error).partition(chr(10))[0]}"
        ) from error
    kind = model.device.type
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else model.dtype
    for prompt, sample, whole in zip(prompts, drawn, wholes, strict=True):
        logits = whole.logits[0, len(prompt) - 1 : -1].float().cpu()
        logp = logits.log_softmax(-1).gather(1, torch.tensor(sample.ids)[:, None])[:, 0]
        # The median, since rounding may change a token's experts.
        difference = (logp - torch.tensor(sample.logp)).abs().median()
        if difference > allowed_difference(logits, dtype):
            raise ValueError(
                "model: expected one that neither reads padding nor counts positions along a "
                f"padded row, got {name}, whose log-probs in transformers' generate differ by "
                f"{difference:.3g} nats from those of whole sequences"
            )


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Do without TF32 within, whose 10 of fp32's 23 bits would look like a wrong formula."""
    matmul: Any = torch.backends.cuda.matmul
    given = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = given
