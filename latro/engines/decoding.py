"""Decoding with the trunk alone: keys and values in place, prompts shared, rows that come and go.

`latro.model.decoding` keeps keys and values, and `latro.model.head_rows` samples at the head. Here
is what is left: which rows are decoded, and where they end. A row that has ended makes room for the
next one, so that a call may have more prompts than are decoded at once; a prompt goes through the
trunk when the first of its rows has room.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from latro.engines.ends import EndRule
from latro.model import few_rows
from latro.model.compiled import CompiledTrunk
from latro.model.decoding import DecodingKeys
from latro.model.head_rows import Reading, SampledRows
from latro.model.sampling_form import SamplingForm, prompts_reading
from latro.rollout.sequences import Progress, Sample
from latro_kernels import LinearSample

MOST_ROWS = {"cpu": 256}
"""Rows that are decoded at once, by kind of device."""
MOST_ROWS_ELSEWHERE = 512
PREFILL_TOKENS = {"cpu": few_rows.MOST_ROWS}
"""Tokens of several prompts that go through at once, by kind of device.

On a CPU those whose products are of few rows, so that what comes of a prompt has the same bits
whatever others go with it. A longer prompt goes alone.
"""
PREFILL_TOKENS_ELSEWHERE = 16384
CPU_KEY_BYTES = 4 * 2**30
"""Bytes of keys and values on a CPU."""
GPU_KEY_SHARE = 4
"""On a GPU keys and values take one part in so many of the memory."""


def seed_of(*entropy: int) -> int:
    """Return a seed from 0 to 2⁶³ − 1 for a sequence of non-negative integers, as a hash of it."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


@dataclass(eq=False)
class _Prompt:
    """A prompt of the call, with the seed of each of its rows."""

    index: int
    ids: list[int]
    seeds: list[int]
    place: int = -1
    """Where its keys are, once it has been read."""
    open: int = 0
    """How many of its rows have not ended."""


@dataclass(eq=False)
class _Row:
    """One completion in the making."""

    prompt: _Prompt
    number: int
    """Which of the prompt's completions it is."""
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)

    @property
    def seed(self) -> int:
        return self.prompt.seeds[self.number]


class Decoding:
    """One call's prompts, on their way to samples.

    Args:
        model: what is called, with the model of `form` in it; in eval mode.
        form: what is known of the model.
        ends: where completions end.
        max_new_tokens: the length limit of a completion.
        temperature: the logits are divided by it; 0: the likeliest token.
        progress: told how it goes.
        trunk: makes the hidden states of a step; None: the model's own trunk.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        form: SamplingForm,
        ends: EndRule,
        *,
        max_new_tokens: int,
        temperature: float,
        progress: Progress | None,
        trunk: CompiledTrunk | None = None,
    ) -> None:
        self.model = model
        self.form = form
        self.ends = ends
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.progress = progress
        self.trunk = trunk
        self.device = model.device
        self._keys = DecodingKeys(model.device)
        self._head: list[tuple[Tensor, Tensor | None]] = []
        self._waiting: deque[_Prompt] = deque()
        self._ready: deque[_Row] = deque()
        self._rows: list[_Row] = []
        self._free: list[int] = []
        self._places = 0
        self._ended: list[_Row] = []
        self._tokens: Tensor | None = None
        self._seeds = torch.empty(0, dtype=torch.int64)

    def __call__(
        self, prompts: Sequence[Sequence[int]], *, num_samples: int, seeds: Sequence[int]
    ) -> list[list[Sample]]:
        """Return `num_samples` samples of each prompt."""
        for index, (ids, seed) in enumerate(zip(prompts, seeds, strict=True)):
            of_rows = [seed_of(seed, number) for number in range(num_samples)]
            self._waiting.append(_Prompt(index, list(ids), of_rows))
        most = self._most_rows(max(map(len, prompts)), num_samples)
        while self._waiting or self._ready or self._rows:
            # Not for every row that has ended: a prefill of several prompts costs as much as of
            # one, and each change of the rows costs some.
            if len(self._rows) <= most - max(1, most // 8):
                self._fill(most)
            if self._rows:
                self._step()
        samples: list[list[Sample]] = [[Sample([])] * num_samples for _ in prompts]
        for row in self._ended:
            logp = row.logp if self.temperature else None
            samples[row.prompt.index][row.number] = Sample(row.ids, logp)
        return samples

    def _most_rows(self, longest_prompt: int, num_samples: int) -> int:
        """Return how many rows are decoded at once.

        That depends on the call and the machine, and not on what is free on it now, so that the
        same call has the same rows beside each other.
        """
        kind = self.device.type
        budget = CPU_KEY_BYTES
        if kind == "cuda":
            budget = torch.cuda.get_device_properties(self.device).total_memory // GPU_KEY_SHARE
        tokens = self.max_new_tokens + -(-longest_prompt // num_samples)
        fit = budget // max(1, tokens * self.form.bytes_per_token)
        return max(1, min(fit, MOST_ROWS.get(kind, MOST_ROWS_ELSEWHERE)))

    def _fill(self, most: int) -> None:
        """Let rows begin until there are `most`."""
        while self._waiting and len(self._rows) + len(self._ready) < most:
            self._prefill(self._next_prompts(most - len(self._rows) - len(self._ready)))
        begun = [
            self._ready.popleft() for _ in range(min(most - len(self._rows), len(self._ready)))
        ]
        self._rows += begun
        if begun:
            self._tokens = None

    def _next_prompts(self, rows: int) -> list[_Prompt]:
        """Take prompts for one prefill, until they have so many rows."""
        taken = [self._waiting.popleft()]
        tokens = PREFILL_TOKENS.get(self.device.type, PREFILL_TOKENS_ELSEWHERE)
        tokens -= len(taken[0].ids)
        rows -= len(taken[0].seeds)
        while self._waiting and rows > 0 and tokens >= len(self._waiting[0].ids):
            taken.append(self._waiting.popleft())
            tokens -= len(taken[-1].ids)
            rows -= len(taken[-1].seeds)
        return taken

    def _prefill(self, prompts: list[_Prompt]) -> None:
        """Read prompts, and sample the first token of all of their rows."""
        for prompt in prompts:
            if not self._free:
                self._free.append(self._places)
                self._places += 1
            prompt.place = heapq.heappop(self._free)
            prompt.open = len(prompt.seeds)
        self._keys.place_prompts([p.place for p in prompts], [len(p.ids) for p in prompts])
        reading = prompts_reading([p.ids for p in prompts], self._keys)
        rows = [_Row(p, number) for p in prompts for number in range(len(p.seeds))]
        last: list[int] = []
        behind = -1
        for prompt in prompts:
            behind += len(prompt.ids)
            last += [behind] * len(prompt.seeds)
        seed = torch.tensor([row.seed for row in rows], device=self.device)
        sampled = self._sample(
            reading, seed, torch.zeros_like(seed), torch.tensor(last, device=self.device)
        )
        going_on = self._take(rows, sampled, others=len(self._rows) + len(self._ready))
        self._ready.extend(row for row, goes_on in zip(rows, going_on, strict=True) if goes_on)

    def _step(self) -> None:
        """Read the last token of every row, and sample the next one."""
        rows = self._rows
        if self._tokens is None:
            self._tokens = torch.tensor([row.ids[-1] for row in rows], device=self.device)
            self._seeds = torch.tensor([row.seed for row in rows], device=self.device)
            self._keys.set_rows(
                [row.prompt.place for row in rows],
                [len(row.prompt.ids) for row in rows],
                [len(row.ids) - 1 for row in rows],
            )
        else:
            self._keys.advance()
        reading = Reading(self._tokens[None], self._keys, trunk=self.trunk)
        sampled = self._sample(reading, self._seeds, self._keys.own_lengths + 1)
        going_on = self._take(rows, sampled, others=len(self._ready))
        self._tokens = sampled.token
        for place in reversed(range(len(rows))):
            if not going_on[place]:
                self._close(place)

    def _sample(
        self, reading: Reading, seed: Tensor, number: Tensor, positions: Tensor | None = None
    ) -> LinearSample:
        rows = SampledRows(
            reading,
            self.form.logits,
            temperature=self.temperature,
            # Kernels are for what models are sampled in; fp64 is for tests and studies.
            backend="reference" if self.model.dtype == torch.float64 else "auto",
            seed=seed,
            number=number,
            positions=positions,
            head=self._head,
        )
        # The whole model, not only its trunk: sharding engines expect calls at the root.
        return self.model(input_ids=reading.input_ids, head_rows=rows)

    def _take(self, rows: Sequence[_Row], sampled: LinearSample, others: int) -> list[bool]:
        """Add the sampled tokens to their rows, and return which rows go on.

        `others` is how many rows have begun beside them.
        """
        # One transfer; fp64 holds token ids and fp32 numbers as they are.
        tokens, logps = torch.stack([sampled.token.double(), sampled.logp.double()]).tolist()
        for row, token, logp in zip(rows, tokens, logps, strict=True):
            row.ids.append(int(token))
            row.logp.append(logp)
        ended = self.ends([row.ids for row in rows])
        going_on = [
            not end and len(row.ids) < self.max_new_tokens
            for row, end in zip(rows, ended, strict=True)
        ]
        for row, goes_on in zip(rows, going_on, strict=True):
            if not goes_on:
                self._ended.append(row)
                row.prompt.open -= 1
                if row.prompt.open == 0:
                    heapq.heappush(self._free, row.prompt.place)
        if self.progress is not None:
            self.progress(len(rows), others + sum(going_on))
        return going_on

    def _close(self, place: int) -> None:
        """Let the last row take the place of one that has ended."""
        last = self._rows.pop()
        self._tokens = None
        if place < len(self._rows):
            self._keys.move_row(len(self._rows), place, len(last.ids) - 1)
            self._rows[place] = last
