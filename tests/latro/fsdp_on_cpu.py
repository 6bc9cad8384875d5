"""`python -m tests.latro.fsdp_on_cpu`: `python -m latro.train` with FSDP2 on processors.

accelerate (1.15) takes FSDP up on accelerators only: where processes are on a CPU it runs DDP
instead, and says nothing. torch itself shards over gloo as well, so the state is told here, and all
that follows is what runs on GPUs.
"""

from __future__ import annotations

from typing import Any

from accelerate import PartialState, accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from latro import train


class ShardingState(AcceleratorState):
    """An `AcceleratorState` whose processes on a CPU shard, as those on GPUs do."""

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
    """Run `latro.train` with FSDP that takes processors."""
    accelerator.AcceleratorState = ShardingState
    train.main()


if __name__ == "__main__":
    main()
