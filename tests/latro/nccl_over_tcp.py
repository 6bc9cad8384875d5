"""A broadcast through torch's TCP store where vLLM has NCCL's, for machines without a GPU.

To import this module puts it in place, in the trainer's process and in a server's workers (`vllm
serve --worker-extension-cls tests.latro.nccl_over_tcp.Extension`). All else of vLLM's weight
transfer is its own: the trainer's engine, the routes, the workers' engine, and how they load what
arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.utils import StatelessProcessGroup
from vllm.distributed.weight_transfer import nccl_common, nccl_engine


class Group:
    """Stands for vLLM's `PyNcclCommunicator`."""

    def __init__(self, group: StatelessProcessGroup) -> None:
        self.group = group

    def broadcast(self, tensor: Tensor, src: int) -> None:
        sends = self.group.rank == src
        tensor.copy_(self.group.broadcast_obj(tensor if sends else None, src))

    def destroy(self) -> None:
        pass


def join(master_address: str, master_port: int, rank: int, world_size: int, device: Any) -> Group:
    group = StatelessProcessGroup.create(
        host=master_address, port=master_port, rank=rank, world_size=world_size
    )
    return Group(group)


def send(
    iterator: Iterable[Any], group: Group, src: int, post_iter_func: Callable[..., Tensor], **_: Any
) -> None:
    for item in iterator:
        group.broadcast(post_iter_func(item).contiguous(), src)


def receive(
    iterator: Iterable[Any], group: Group, src: int, post_unpack_func: Callable[..., Any], **_: Any
) -> None:
    for name, (shape, dtype) in iterator:
        weight = torch.empty(shape, dtype=dtype)
        group.broadcast(weight, src)
        post_unpack_func([(name, weight)])


class Extension:
    """What a worker is to have more: nothing, but vLLM imports this module for it."""


nccl_common.stateless_init_process_group = join
nccl_engine.packed_nccl_broadcast_producer = send
nccl_engine.packed_nccl_broadcast_consumer = receive
# There is no accelerator to number, nor to wait for.
torch.accelerator.current_device_index = lambda: 0
torch.accelerator.synchronize = lambda: None
