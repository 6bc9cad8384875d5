"""Weights from the trainer's GPU to a server's by NCCL, through vLLM's own weight-transfer engines.

This is imported only for `--vllm_sync nccl`, since it needs the package vllm. The server is started
with --weight-transfer-config '{"backend": "nccl"}' besides its other settings. The trainer's main
process is rank 0 of a group with the server's workers behind it; before the first update the server
is told where to join.

Untested beyond a CPU: the tests run vLLM 0.32's trainer engine, routes and worker engine with a
broadcast of their own for NCCL's. NCCL itself, and packing into its buffers, have not run. A server
that ends while it receives leaves the trainer waiting, since vLLM's group has no time limit; one
that cannot join shows after the 300 seconds that vLLM waits for it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from vllm.distributed.weight_transfer import (
    ParamMeta,
    TrainerWeightTransferEngine,
    WeightSource,
    WeightTransferTrainerFactory,
)
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from latro.engines.vllm_weights import named_weights


class Weights(WeightSource):
    """The weights of one update, which are on `device` when they are sent."""

    def __init__(self) -> None:
        self.tensors: Mapping[str, Tensor] = {}
        self.device = torch.device("cpu")

    def metadata(self) -> list[ParamMeta]:
        """Return names, dtypes and shapes."""
        return [ParamMeta(name, t.dtype, tuple(t.shape)) for name, t in self.tensors.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.tensors.items():
            yield name, tensor.detach().to(self.device)


class Routes:
    """The server's routes, as vLLM's `VLLMWeightSyncClient` names them.

    None of their requests is repeated: each moves the server on.
    """

    def __init__(self, request: Callable[..., Any]) -> None:
        self._request = request

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Make the workers join the group."""
        self._request("/init_weight_transfer_engine", {"init_info": init_info}, attempts=1)

    def start_weight_update(self) -> None:
        """Make the workers ready to receive."""
        self._request("/start_weight_update", {}, attempts=1)

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Make the workers receive, while the trainer sends."""
        self._request("/update_weights", {"update_info": update_info}, attempts=1)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Make the workers use what they received."""
        self._request("/finish_weight_update", {"weight_version": weight_version}, attempts=1)


class WeightBroadcast:
    """Hands weights to a server through NCCL.

    Args:
        address: this machine's, as the server reaches it.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._weights = Weights()
        self._engine: TrainerWeightTransferEngine[Any] | None = None

    def __call__(
        self,
        model: PreTrainedModel,
        step: int,
        weights: Mapping[str, Tensor] | None,
        request: Callable[..., Any],
    ) -> None:
        """Make the server take the weights; `request` sends it a request.

        The other arguments are those of `RolloutEngine.update_weights`.

        Raises:
            ConnectionError: it could not, and must be restarted.
        """
        self._weights.tensors = named_weights(model, weights)
        self._weights.device = model.device
        try:
            if self._engine is None:
                self._engine = self._join(request)
            self._engine.send_weights()
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConnectionError(
                f"{error}; the server did not take the weights over NCCL. Start it anew, its "
                "weights may be in pieces"
            ) from error
        finally:
            self._weights.tensors = {}

    def _join(self, request: Callable[..., Any]) -> TrainerWeightTransferEngine[Any]:
        workers = request("/get_world_size").at("world_size").of(int)
        with socket.socket() as free:
            free.bind((self.address, 0))
            port = free.getsockname()[1]
        return WeightTransferTrainerFactory.trainer_init(
            NCCLTrainerInitInfo(
                master_address=self.address, master_port=port, world_size=workers + 1, rank=0
            ),
            client=Routes(request),
            source=self._weights,
        )
