"""Rollouts in this process: K completions per prompt from one shared prefill.

Models that know packed rows are decoded by `latro.engines.decoding`. Others, which keep a state
from token to token or whose attention is their own, are handed to transformers' `generate`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import ModelOutput

from latro.engines.decoding import MOST_ROWS, MOST_ROWS_ELSEWHERE, Decoding, seed_of
from latro.engines.ends import EndRule, TokenLetters
from latro.model.adapters import without_wrapper
from latro.model.compiled import CompiledTrunk
from latro.model.few_rows import few_rows
from latro.model.forwards import evaluation_mode
from latro.model.sampling_form import SamplingForm, check_generated, sampling_form
from latro.rollout.long_rope import long_rope_boundary
from latro.rollout.sequences import Progress, Sample, eos_token_ids
from latro_kernels.integrations.logits import trunk_of

__all__ = ["TransformersEngine", "seed_of"]


logger = logging.getLogger(__name__)


class TransformersEngine:
    """Samples from the policy in this process.

    A prompt's samples depend only on its seed and the weights, and not on the prompts beside it or
    the number of processes that share them; but where a product rounds in another way with other
    rows beside a row, as on GPUs, two tokens that are as close as that may change places. The
    global random state is not touched.

    Args:
        model: a causal language model; it is in eval mode while it generates.
        tokenizer: decodes the text that is searched for the template.
        compiles: whether torch compiles the decoding step.

    Raises:
        ValueError: the model keeps a cache of its own instead of one of transformers', so it may
            read padding as tokens, and its samples cannot share their prompt's prefill; or it is
            left to transformers' `generate`, whose steps are not compiled.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, compiles: bool = False
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._letters = TokenLetters(tokenizer)
        self._is_tried = False
        self.boundary = long_rope_boundary(model)
        if not without_wrapper(model)._supports_default_dynamic_cache():
            raise ValueError(
                "model: expected one that generates with a cache of transformers, got "
                f"{type(without_wrapper(model)).__name__}, whose cache is its own"
            )
        self.form = sampling_form(without_wrapper(model))
        if isinstance(self.form, str):
            logger.info(
                "%s is sampled from by transformers' generate: %s", type(model).__name__, self.form
            )
            if compiles:
                raise ValueError(
                    "rollout_compile: expected a model that is decoded by latro's own steps, got "
                    f"{type(without_wrapper(model)).__name__}: {self.form}"
                )
        self._trunk = CompiledTrunk(trunk_of(without_wrapper(model))) if compiles else None

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_samples: int,
        max_new_tokens: int,
        temperature: float,
        seeds: Sequence[int],
        template: str | None = None,
        progress: Progress | None = None,
    ) -> list[list[Sample]]:
        """Return samples as `RolloutEngine.generate` describes.

        `progress` is called after each step with the tokens that were sampled in it, and with how
        many rows go on.

        A LongRoPE model uses the frequencies of the longest sequence for a whole batch. So prompts
        on different sides of its boundary go into different batches, and a completion ends, as at
        the length limit, before its sequence would cross the boundary.

        Raises:
            ValueError: a prompt has as many tokens as the boundary; or transformers' `generate`,
                which the model is left to, does not sample from it as it is scored.
        """
        limits = [_limit(len(prompt), max_new_tokens, self.boundary) for prompt in prompts]
        samples: dict[int, list[Sample]] = {}
        for kind in dict.fromkeys(limits):
            of_kind = [i for i, limit in enumerate(limits) if limit == kind]
            size = self._batch_size(len(of_kind), num_samples)
            for start in range(0, len(of_kind), size):
                together = of_kind[start : start + size]
                batch = self._generate_batch(
                    [prompts[i] for i in together],
                    num_samples=num_samples,
                    max_new_tokens=kind.new_tokens,
                    temperature=temperature,
                    seeds=[seeds[i] for i in together],
                    template=template,
                    progress=progress,
                )
                samples.update(zip(together, batch, strict=True))
        return [samples[i] for i in range(len(prompts))]

    def _batch_size(self, count: int, num_samples: int) -> int:
        """Return how many of `count` prompts may go into one batch."""
        if isinstance(self.form, SamplingForm):
            # Rows begin as others end, so that memory does not depend on the number of prompts.
            return count
        most = MOST_ROWS.get(self.model.device.type, MOST_ROWS_ELSEWHERE)
        return max(1, most // num_samples)

    def _generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_samples: int,
        max_new_tokens: int,
        temperature: float,
        seeds: Sequence[int],
        template: str | None,
        progress: Progress | None,
    ) -> list[list[Sample]]:
        """Return the samples of prompts that may share a batch."""
        eos = eos_token_ids(self.model, self.tokenizer)
        with evaluation_mode(self.model):
            if isinstance(self.form, SamplingForm):
                decoding = Decoding(
                    self.model,
                    self.form,
                    EndRule(self.tokenizer, eos, template, self._letters),
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    progress=progress,
                    trunk=self._trunk,
                )
                with few_rows(self.model):
                    return decoding(prompts, num_samples=num_samples, seeds=seeds)
            # Here, and not when the engine is made: weights in shards are whole in a rollout.
            if not self._is_tried:
                check_generated(self.model, self._by_transformers)
                self._is_tried = True
            return self._by_transformers(
                prompts,
                num_samples=num_samples,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seeds=seeds,
                template=template,
                eos=eos,
                progress=progress,
            )

    def _by_transformers(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_samples: int,
        max_new_tokens: int,
        temperature: float,
        seeds: Sequence[int],
        template: str | None = None,
        eos: Sequence[int] = (),
        progress: Progress | None = None,
    ) -> list[list[Sample]]:
        """Return the samples that transformers' `generate` makes."""
        model = self.model
        device = model.device
        width = max(len(p) for p in prompts)
        # The padding is masked, so real tokens never attend to it and any id will do.
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        sampling = [SeededSampling(seeds, num_samples, temperature, device)] if temperature else []

        # A model's own generation config may truncate the distribution (top-k, top-p, penalties),
        # and then samples are not the policy's. A plain config replaces it for the call.
        plain = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(eos) or None,
            pad_token_id=eos[0] if eos else 0,
        )
        # PEFT's wrapper copies its own config to the model inside and leaves it there.
        owners = (model, without_wrapper(model))
        own_configs = [owner.generation_config for owner in owners]
        for owner in owners:
            owner.generation_config = plain
        try:
            # A prompt one token longer than LongRoPE's boundary would be prefilled without its
            # last token, and so with the short frequencies instead of the long ones.
            apart = self.boundary is not None and width - 1 == self.boundary
            shared = {} if width == 1 or apart else _prefill(model, ids, mask)
            for cache in shared.values():
                # Reordered with repeated rows: caches of linear attention cannot be repeated.
                cache.reorder_cache(torch.arange(len(ids)).repeat_interleave(num_samples))
                if not _knows_its_length(cache):
                    ids, mask = ids[:, -1:], mask[:, -1:]
            start = ids.shape[1]
            stop = TemplateStop(
                self.tokenizer,
                prompt_length=start,
                num_rows=len(prompts) * num_samples,
                eos_token_ids=eos,
                template=template,
                progress=progress,
                letters=self._letters,
            )
            output = model.generate(
                input_ids=ids.repeat_interleave(num_samples, dim=0),
                attention_mask=mask.repeat_interleave(num_samples, dim=0),
                **shared,
                logits_processor=LogitsProcessorList(sampling),
                stopping_criteria=StoppingCriteriaList([stop]),
                # Sharded weights are gathered for the whole call, so no step has to wait for other
                # processes.
                synced_gpus=False,
            )
        finally:
            for owner, own_config in zip(owners, own_configs, strict=True):
                owner.generation_config = own_config

        rows = output[:, start:].tolist()
        samples = [Sample(r[:n]) for r, n in zip(rows, stop.lengths, strict=True)]
        for sampler in sampling:
            logps = torch.stack(sampler.logp, dim=1).tolist()
            samples = [
                replace(sample, logp=logp[: len(sample.ids)])
                for sample, logp in zip(samples, logps, strict=True)
            ]
        return [samples[i : i + num_samples] for i in range(0, len(samples), num_samples)]

    def update_weights(
        self, model: PreTrainedModel, step: int, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Do nothing: the engine samples from the policy itself."""


class _Limit(NamedTuple):
    """The properties that prompts must share to go through a LongRoPE model in one batch."""

    long: bool
    new_tokens: int


def _limit(prompt_length: int, max_new_tokens: int, boundary: int | None) -> _Limit:
    if boundary is None:
        return _Limit(False, max_new_tokens)
    if prompt_length > boundary:
        return _Limit(True, max_new_tokens)
    if prompt_length == boundary:
        raise ValueError(
            f"prompts: expected fewer or more than {boundary} tokens, the most that the model's "
            f"short rotary frequencies are for, got {prompt_length}, which leaves no room for a "
            "completion"
        )
    return _Limit(False, min(max_new_tokens, boundary - prompt_length))


class SeededSampling(LogitsProcessor):
    """Leaves one token per row, drawn from softmax(logits / T) by the prompt's own random numbers.

    Each row draws one number u and takes the first token whose cumulative probability exceeds u.
    Other ways draw a number for every token of the vocabulary, which costs more than the rest of a
    decoding step's head.

    Args:
        seeds: one per prompt.
        num_samples: number of consecutive rows that belong to one prompt.
        temperature: T, more than 0.
        device: the device of the logits.

    Attributes:
        logp: of each step, fp32 [rows], the log-probs in nats of the tokens that were drawn.
    """

    def __init__(
        self, seeds: Sequence[int], num_samples: int, temperature: float, device: torch.device
    ) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.num_samples = num_samples
        self.temperature = temperature
        self.logp: list[Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Tensor:
        # fp64, so that the sum keeps the digits of tokens with little probability.
        probability = (scores.float() / self.temperature).softmax(-1)
        cumulative = probability.cumsum(-1, dtype=torch.float64)
        u = torch.cat([self._numbers(g, scores.device) for g in self.generators])[:, None]
        # `right=True` means exceeds, not reaches, so a token of probability 0 is never taken.
        chosen = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)
        chosen.clamp_(max=scores.shape[1] - 1)
        self.logp.append(probability.gather(1, chosen)[:, 0].log())
        return torch.full_like(scores, -math.inf).scatter_(1, chosen, 0.0)

    def _numbers(self, generator: torch.Generator, device: torch.device) -> Tensor:
        return torch.rand(self.num_samples, dtype=torch.float64, device=device, generator=generator)


class TemplateStop(StoppingCriteria):
    """Ends rows by an `EndRule` in transformers' `generate`, and records their lengths.

    Thanks to the lengths, ends need not be found by padding, so a tokenizer whose padding token is
    its end token is no special case.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_length: int,
        num_rows: int,
        eos_token_ids: Sequence[int],
        template: str | None,
        progress: Progress | None = None,
        letters: TokenLetters | None = None,
    ) -> None:
        self.rule = EndRule(tokenizer, eos_token_ids, template, letters)
        self.prompt_length = prompt_length
        self.progress = progress
        self.lengths = [0] * num_rows
        self.done = [False] * num_rows

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: object
    ) -> Tensor:
        # One token more than the rule looks at shows it that there are more.
        start = max(self.prompt_length, input_ids.shape[1] - self.rule.window - 1)
        tails = input_ids[:, start:].tolist()
        open_rows = [row for row, done in enumerate(self.done) if not done]
        ended = self.rule([tails[row] for row in open_rows])
        for row, end in zip(open_rows, ended, strict=True):
            self.lengths[row] = input_ids.shape[1] - self.prompt_length
            self.done[row] = end
        if self.progress is not None:
            self.progress(len(open_rows), len(open_rows) - sum(ended))
        return torch.tensor(self.done, device=input_ids.device)


def caches_in(output: ModelOutput) -> dict[str, Cache]:
    """Return the caches in a model's output, by their names in this version of transformers."""
    return {name: value for name, value in output.items() if isinstance(value, Cache)}


def _prefill(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> dict[str, Cache]:
    """Return the cache of all prompt tokens but the last, by its name; generation reads the last.

    The name is the model's: generation passes the cache back to the model's forward by that name,
    which differs between versions of transformers.

    Raises:
        ValueError: the model returns no cache, so K samples would have to read their prompt K
            times.
    """
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    # Call the whole model, not only its trunk: sharding engines expect calls at the root.
    output = model(
        input_ids=ids[:, :-1],
        attention_mask=mask[:, :-1],
        position_ids=positions[:, :-1],
        use_cache=True,
        logits_to_keep=1,
        return_dict=True,
    )
    kept = caches_in(output)
    if len(kept) != 1:
        raise ValueError(
            "model: expected one that returns a cache of transformers, which the samples of a "
            f"prompt can share, got {type(without_wrapper(model)).__name__}, which returns "
            f"{', '.join(output)}"
        )
    return kept


def _knows_its_length(cache: Cache) -> bool:
    """Return whether a cache knows how many tokens it holds, so that `generate` skips those."""
    try:
        cache.get_seq_length()
    except ValueError:
        # All its layers keep a state of fixed size, however many tokens they have read.
        return False
    return True
