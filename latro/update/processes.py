"""What the processes of a run agree on and exchange around forwards and backwards.

Each process has groups of its own, whole ones, and the engine averages the gradients. An epoch's
last batch may have none for some. Every backward exchanges gradients, and where weights are sharded
every forward gathers them, so all processes must call these equally often: they agree on the number
of pieces, and a process with fewer of them fills up with tiny ones that count for nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import zip_longest

from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn


def agreed_pieces(pieces: list[int], accelerator: Accelerator) -> list[int]:
    """Return how many pieces each micro-batch has in every process, those that fill up included."""
    if accelerator.num_processes == 1:
        return pieces
    return [max(slot) for slot in zip_longest(*gather_object([pieces]), fillvalue=0)]


@contextlib.contextmanager
def exchange(model: nn.Module, accelerator: Accelerator, *, last: bool) -> Iterator[None]:
    """Surround a forward and its backward, so that only the last one exchanges gradients.

    FSDP exchanges at each, since a gradient that waits for the last is not sharded.
    """
    kind = accelerator.distributed_type
    if last or kind == DistributedType.FSDP:
        yield
    elif kind == DistributedType.DEEPSPEED:
        # accelerate steps DeepSpeed's optimiser in the backward that exchanges gradients.
        given = accelerator.sync_gradients
        accelerator.sync_gradients = False
        try:
            yield
        finally:
            accelerator.sync_gradients = given
    else:
        with accelerator.no_sync(model):
            yield


def backward(loss: Tensor, accelerator: Accelerator) -> Tensor:
    """Backpropagate this process's share of a loss; return it, scaled and detached.

    Processes average their gradients, and the Trainer their losses. These are shares of one loss,
    of which both have to be the sum, so each is multiplied by the number of processes.
    """
    loss = loss * accelerator.num_processes
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    # The loss is averaged over accumulation steps already.
    accelerator.backward(loss, **({"scale_wrt_gas": False} if deepspeed else {}))
    return loss.detach()
