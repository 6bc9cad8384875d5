"""`python -m tests.latro.fsdp_on_cpu`: `python -m latro.train` with FSDP2 on a CPU.

accelerate (1.15) uses FSDP only on accelerators: on a CPU it silently runs DDP instead. torch
itself can shard over gloo, so this module sets accelerate's state; everything else is as on GPUs.
"""

from __future__ import annotations

from typing import Any

from accelerate import PartialState, accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from latro import train


class ShardingState(AcceleratorState):
    """An `AcceleratorState` that shards on a CPU as on GPUs."""

    def __init__(
        self, *args: Any, fsdp_plugin: FullyShardedDataParallelPlugin | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, fsdp_plugin=fsdp_plugin, **kwargs)
        if self.distributed_type != DistributedType.MULTI_CPU:
            return
        if fsdp_plugin is None:
            raise ValueError("expected FSDP to be asked for, got no plugin of it")
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def main() -> None:
    """Run `latro.train` with FSDP on a CPU."""
    accelerator.AcceleratorState = ShardingState
    train.main()


if __name__ == "__main__":
    main()
