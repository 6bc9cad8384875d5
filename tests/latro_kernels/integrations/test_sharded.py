"""The fused heads under FSDP2, over two processes, against one process without it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from latro_kernels.integrations.transformers import fused_head
from tests.latro_kernels.integrations.models import batch, model_of
from tests.warm_process import WarmProcess

pytestmark = pytest.mark.long

CASES = {"tied": "gemma2", "head of its own": "llama", "TRL": "gemma2"}


def gradients(model: PreTrainedModel, case: str) -> dict[str, Tensor]:
    ids, labels = batch()
    options = {"fused_lm_head": True} if case == "TRL" else {}
    model(ids, labels=labels, **options).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def shard(model: PreTrainedModel, case: str) -> nn.Module:
    if case == "head of its own":
        # Its weight is given away after its forward, and gathered again by hooks on its output.
        fully_shard(model.lm_head, reshard_after_forward=True)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def main() -> None:
    """Run one of the processes: its first argument is the folder for the gradients."""
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    for case, architecture in CASES.items():
        model = model_of(architecture)
        if case == "TRL":
            from trl.trainer import utils

            from latro_kernels.integrations.trl import patch_trl

            patch_trl()
            utils.add_fused_lm_head(model)
        else:
            fused_head(model)
        found = gradients(shard(model, case), case)
        whole = {name: grad.full_tensor() for name, grad in found.items()}
        if dist.get_rank() == 0:
            torch.save(whole, folder / f"{case}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, warm: WarmProcess) -> Path:
    pytest.importorskip("trl", reason="needs trl, of pip install '.[test]'")
    folder = tmp_path_factory.mktemp("ranks")
    warm.run_together(__name__, [folder], folder / "printed", processes=2)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(case: str, sharded: Path) -> None:
    ours = torch.load(sharded / f"{case}.pt")
    plain = gradients(model_of(CASES[case]), "plain")
    truth = gradients(model_of(CASES[case]).double(), "plain")
    for name, exact in truth.items():
        error = (plain[name] - exact).abs().max()
        assert (ours[name] - exact).abs().max() <= 2 * error + 1e-5, name
