"""Two processes that share a prompt's completions end with the weights of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.latro.engines_on_cpu import ZERO3
from tests.latro.integrations.trl_update import save_untied, update
from tests.warm_process import WarmProcess

pytest.importorskip("trl", reason="needs trl, of pip install '.[test]'")

pytestmark = [
    pytest.mark.long,
    # TRL uses the old name of a setting that transformers has renamed.
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning"),
]


def by_two(engine: str, case: str, folder: Path, warm: WarmProcess) -> dict[str, Tensor]:
    """Return what `update` returns in the first of two processes."""
    warm.run_together(
        "tests.latro.integrations.trl_update",
        [folder, engine, case],
        folder / "printed",
        processes=2,
    )
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize(
    ("engine", "case"),
    [
        ("ddp", "RLOO"),
        ("fsdp2", "RLOO"),
        ("fsdp2", "RLOO with LoRA"),
        pytest.param(*ZERO3.values, "GRPO", marks=ZERO3.marks),
        pytest.param("zero2", "RLOO with a shared prefix", marks=ZERO3.marks),
    ],
)
def test_a_group_in_two_processes_is_one_group(
    engine: str, case: str, tmp_path: Path, warm: WarmProcess
) -> None:
    save_untied(tmp_path)
    one = update(str(tmp_path), 1, 0, "one", case)
    two = by_two(engine, case, tmp_path, warm)
    moved = (one["after"] - one["before"]).abs().max()
    assert moved > 1e-3
    assert (two["after"] - one["after"]).abs().max() <= 1e-5 * moved


def test_log_probs_are_fp32_where_fsdp2_runs_in_bf16(tmp_path: Path, warm: WarmProcess) -> None:
    save_untied(tmp_path)
    scores = by_two("fsdp2", "RLOO in bf16", tmp_path, warm)["scores"]
    assert scores.dtype == torch.float32
    assert (scores != scores.bfloat16()).float().mean() > 0.5
