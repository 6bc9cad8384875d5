"""Rollouts of the next update, sampled by a server while this update is computed.

With `--async_rollouts 1` update t, which makes weights t + 1 of weights t, learns from rationales
that weights t − 1 sampled:

    server    samples for t + 1, by weights t │ takes weights t + 1 │ samples for t + 2 …
    trainer   computes update t               │ waits for samples   │ computes update t + 1 …

So its rationales are of a policy that is one update old, which `importance_cap` corrects for token
by token. The first update of an epoch has nothing older: it samples with its own weights, and so
the same weights sample for the second. No request reaches beyond the end of an epoch, or of the
run.

So which weights sample for which update depends on the data alone. A checkpoint waits for the
rollouts that are under way and holds them, since the weights that drew them are gone by then. A run
that resumes takes them from there, and is the run that was never stopped. Prompts are known by
their place in the whole update, as seeds are, so another number of processes may resume.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from latro.engines.vllm import VllmEngine
from latro.engines.vllm_client import Hangup
from latro.errors import reading
from latro.rollout.sequences import Sample

ROLLOUTS_FILE = "next_rollouts.json"

_logger = logging.getLogger(__name__)


class Lookahead(Iterator[Any]):
    """An iterator whose next items can be seen before they are taken."""

    def __init__(self, source: Iterator[Any]) -> None:
        self.source = source
        self._seen: deque[Any] = deque()

    def __next__(self) -> Any:
        return self._seen.popleft() if self._seen else next(self.source)

    def peek(self, count: int) -> list[Any]:
        """Return the next items, up to `count` of them, and leave them there."""
        self._seen.extend(islice(self.source, max(count - len(self._seen), 0)))
        return list(islice(self._seen, count))


class Request(NamedTuple):
    """One prompt whose completions are to be sampled."""

    prompt: list[int]
    """Its token ids."""
    seed: int


class RolloutsAhead:
    """The samples of one update's prompts, which a thread asks the server for.

    Attributes:
        batches: the epoch's, from the next update on.

    Args:
        engine: the server's.
        sampling: arguments of `engine.generate` that are the same for every request.
    """

    def __init__(self, engine: VllmEngine, sampling: Mapping[str, Any]) -> None:
        self.engine = engine
        self.sampling = sampling
        self.batches = Lookahead(iter(()))
        self._prompts: dict[int, list[int]] = {}
        self._samples: Future[list[list[Sample]]] | None = None
        self._hangup = Hangup()

    @property
    def requested(self) -> bool:
        """Return whether there are samples to take, or to wait for."""
        return self._samples is not None

    def watch(self, batches: Iterator[Any]) -> Lookahead:
        """Return an epoch's batches, to be taken from and to be seen ahead."""
        if self.batches.source is not batches:
            self.batches = Lookahead(batches)
        return self.batches

    def request(self, requests: Mapping[int, Request]) -> None:
        """Ask for samples in the background.

        Args:
            requests: by place in the whole update; where this process has none, nothing happens.
        """
        self._prompts = {place: request.prompt for place, request in requests.items()}
        if not requests:
            return
        self._hangup = Hangup()
        pool = ThreadPoolExecutor(1, "rollouts")
        self._samples = pool.submit(
            self.engine.generate,
            list(self._prompts.values()),
            seeds=[request.seed for request in requests.values()],
            hangup=self._hangup,
            **self.sampling,
        )
        pool.shutdown(wait=False)

    def drain(self) -> dict[int, list[Sample]]:
        """Wait until the server has sampled; return the samples by place, and keep them.

        Raises:
            ValueError: the server has other weights than it was given last.
            ConnectionError: as `VllmEngine.generate`.
        """
        if self._samples is None:
            return {}
        return dict(zip(self._prompts, self._samples.result(), strict=True))

    def take(self, requests: Mapping[int, Request]) -> dict[int, list[Sample]]:
        """Return the samples that were requested, by place, and forget them.

        Raises:
            ValueError: they were requested for other prompts; else as `drain`.
        """
        samples = self.drain()
        if any(self._prompts.get(place) != request.prompt for place, request in requests.items()):
            raise ValueError(
                f"resume_from_checkpoint: expected rollouts of the run's next prompts in its "
                f"{ROLLOUTS_FILE}, got those of others"
            )
        self._samples = None
        return samples

    def cancel(self) -> None:
        """Forget all samples, and end the requests for them."""
        self._hangup()
        self._samples = None

    def state(self) -> list[dict[str, Any]] | str:
        """Wait for the samples; return them as what JSON can hold, or why there are none."""
        try:
            drawn = self.drain()
        except (ConnectionError, ValueError) as error:
            return str(error)
        return [
            {
                "place": place,
                "prompt": self._prompts[place],
                "samples": [{"ids": sample.ids, "logp": sample.logp} for sample in samples],
            }
            for place, samples in drawn.items()
        ]

    def save(self, folder: Path, states: Sequence[list[dict[str, Any]] | str]) -> None:
        """Write the states of all processes into a checkpoint; at an epoch's end there is none.

        A server that failed takes no checkpoint with it: the scheduler that stops the run may have
        stopped the server too.
        """
        failures = [state for state in states if isinstance(state, str)]
        if failures:
            _logger.warning(
                "%s is without rollouts of the next update: %s. A run that goes on from there "
                "samples that update with its own weights",
                folder.name,
                failures[0],
            )
            return
        drawn = [prompt for state in states for prompt in state]
        if drawn:
            (folder / ROLLOUTS_FILE).write_text(json.dumps(drawn), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Take over the samples that a checkpoint holds, those of all processes.

        Raises:
            ValueError: the file with them cannot be read.
        """
        path = folder / ROLLOUTS_FILE
        if not path.exists():
            return
        with reading("resume_from_checkpoint", path):
            states = json.loads(path.read_bytes())
        self._prompts = {state["place"]: state["prompt"] for state in states}
        self._samples = Future()
        self._samples.set_result([[Sample(**s) for s in state["samples"]] for state in states])
