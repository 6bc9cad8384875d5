"""A decoding step that torch compiles as a whole.

Beside its products a step is small operations, dozens in a layer, and on a CPU these and the Python
between them take as long as the products. `torch.compile` makes a few loops of them. What changes
from step to step, which rows there are and where their keys lie, would be compiled anew each time.
So attention is one operation of the graph, which finds all that in the step's `DecodingKeys`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from latro.model.decoding import DecodingKeys
from latro.model.sampling_form import hidden_difference

logger = logging.getLogger(__name__)


def _unguarded() -> contextlib.AbstractContextManager[Any]:
    """Let torch run what it has compiled, without a look at whether it fits."""
    return torch.compiler.set_stance(skip_guard_eval_unsafe=True)


class CompiledTrunk:
    """A model's trunk, for decoding steps. It is compiled in the first one, which takes a minute.

    Args:
        trunk: in eval mode in each step; its weights may change between them.
    """

    def __init__(self, trunk: nn.Module) -> None:
        self._trunk: Any = trunk
        self._name = type(trunk).__name__

        def step(**inputs: Any) -> Tensor:
            return trunk(**inputs).last_hidden_state[0]

        # torch gives up after so many graphs of a function's code, which each trunk has to itself.
        step.__code__ = step.__code__.replace()
        # Dynamic: rows end, and others begin. What does not become one graph would run in pieces,
        # with little gain. Whether sizes between operations are as expected shows in the first
        # step, and need not be looked at in each.
        self._compiled: Any = torch.compile(
            step, dynamic=True, fullgraph=True, options={"size_asserts": False}
        )
        self._is_tried = False
        self._last: tuple[weakref.ref[DecodingKeys], int] | None = None

    def __call__(self, **inputs: Any) -> Tensor:
        """Return the hidden states [R, H] of a step's tokens, after the trunk's final norm.

        Args:
            inputs: what the trunk is given: `input_ids` and `position_ids` [1, R], `decoding`, the
                `DecodingKeys` of the step, and more.

        Raises:
            ValueError: torch cannot compile the trunk as one graph, or what it makes of the first
                step differs from what the trunk makes.
        """
        if self._is_tried:
            return self._step(inputs)
        logger.info("compiling the decoding step of %s", self._name)
        # Keys and values are written twice, to the same place.
        expected = self._trunk(**inputs).last_hidden_state[0]
        hidden = self._step(inputs)
        # What is not a number is infinitely far from one.
        found = hidden.nan_to_num(nan=math.inf)
        if difference := hidden_difference(found, expected, expected.dtype):
            raise ValueError(
                "rollout_compile: expected a model that torch.compile computes as it is, got "
                f"{self._name}: {difference}"
            )
        self._is_tried = True
        return hidden

    def _step(self, inputs: dict[str, Any]) -> Tensor:
        count = inputs["input_ids"].shape[1]
        # Of a single row there are two: torch would compile once more for a size of 1. Copies,
        # since it would do so too for a view where it has seen none.
        times = 2 if count == 1 else 1
        copies = {name: inputs[name].repeat(1, times) for name in ("input_ids", "position_ids")}
        keys: DecodingKeys = inputs["decoding"]
        # Before each step torch looks whether what it compiled is of this model, its mode and these
        # sizes, at everything in every layer. In one call of a rollout, which has these keys, the
        # model is the same, and so are the sizes where there are as many rows as a step before.
        now = weakref.ref(keys), count
        is_known, self._last = now == self._last, now
        try:
            with keys.in_graph(), _unguarded() if is_known else contextlib.nullcontext():
                hidden: Tensor = self._compiled(**inputs | copies)[:count]
        except TorchDynamoException as error:
            raise ValueError(
                "rollout_compile: expected a model of which torch.compile makes one graph, got "
                f"{self._name}: {str(error).partition(chr(10))[0]}"
            ) from error
        return hidden
