"""Two processes that share a prompt's completions end with the weights of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from latro.config.training import SMALL_MODEL
from tests.latro.integrations.trl_update import update
from tests.warm_process import WarmProcess

pytest.importorskip("trl", reason="needs trl, of pip install '.[test]'")

pytestmark = [
    pytest.mark.long,
    # TRL uses the old name of a setting that transformers has renamed.
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning"),
]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensor, float]:
    """Return the weights after the update, and how far the farthest one moved."""
    after = update(str(tmp_path_factory.mktemp("one")), 1, 0, "one")
    model = AutoModelForCausalLM.from_pretrained(SMALL_MODEL)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    moved = (after - before).abs().max().item()
    assert moved > 1e-3
    return after, moved


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_group_in_two_processes_is_one_group(
    engine: str, tmp_path: Path, warm: WarmProcess, one_process: tuple[Tensor, float]
) -> None:
    warm.run_together(
        "tests.latro.integrations.trl_update",
        [tmp_path, engine],
        tmp_path / "printed",
        processes=2,
    )
    expected, moved = one_process
    ours = torch.load(tmp_path / "weights.pt")
    assert (ours - expected).abs().max() <= 1e-5 * moved
