"""How an update that does not fit in memory is recognised, and a token budget that may fit.

With several processes the error is final. The others are in the middle of an exchange of gradients
or weights, which can be neither left nor finished without this one; to agree before every exchange
that all have got so far would cost each of them a wait for the device.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from latro.model.packing import Group, Size

logger = logging.getLogger(__name__)


def smaller_budget(pieces: Sequence[list[Group]], token_budget: int, *, packed: bool) -> int:
    """Return half of the token budget, or of the largest piece where no piece used it up.

    Args:
        pieces: the batches of an update that did not fit.
        token_budget: positions of one piece, by which they were planned.
        packed: whether batches are packed or padded.

    Raises:
        torch.OutOfMemoryError: every piece is a single sequence.
    """
    if all(sum(map(len, piece)) == 1 for piece in pieces):
        raise torch.OutOfMemoryError(
            "out of memory with one sequence at a time: lower max_completion_length, shard or "
            "offload weights and optimiser, train an adapter, or turn on "
            "activation_checkpointing"
        )
    largest = max(sum(map(Size.of, piece), start=Size()).tokens(packed=packed) for piece in pieces)
    token_budget = max(1, min(token_budget, largest) // 2)
    logger.warning(
        "out of memory: token_budget is %d from here on, and the update runs again; pass it as "
        "--token_budget to start with it",
        token_budget,
    )
    return token_budget


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error tells that memory ran out: torch's, on CUDA and CPU, or ours."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    message = str(error)
    return isinstance(error, RuntimeError) and any(
        sign in message
        for sign in (
            "out of memory",
            "not enough memory",
            "DefaultCPUAllocator: can't allocate memory",
            "CUBLAS_STATUS_ALLOC_FAILED",
            "LATRO_OUT_OF_MEMORY",
        )
    )
