"""`fused_head` and `patch_trl()` in trainers under ZeRO-3, by two processes, and plain ones by one.

ZeRO-3 shards the models as they are loaded, since the trainer's arguments are made before.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from latro_kernels.integrations.transformers import fused_head
from tests.latro_kernels.integrations.models import TOKENIZER, model_of
from tests.warm_process import WarmProcess

pytest.importorskip("datasets", reason="needs datasets, of pip install '.[test]'")

from transformers import Trainer, TrainingArguments

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="deepspeed is not installed, and no dependency of the tests",
    ),
]

CASES = {"tied": "gemma2", "head of its own": "llama", "TRL": "llama"}


def two_updates(
    case: str, folder: Path, processes: int = 1, dtype: str = "float32", **settings: Any
) -> Tensor:
    """Return all weights after two updates of SGD; with our head where there are processes."""
    from datasets import Dataset

    common = {
        **{"output_dir": str(folder / "run"), "max_steps": 2, "learning_rate": 0.01},
        **{"per_device_train_batch_size": 4 // processes, "optim": "sgd", "max_grad_norm": 0.0},
        **{"lr_scheduler_type": "constant", "report_to": "none", "save_strategy": "no"},
        **{"disable_tqdm": True, "use_cpu": True, **settings},
    }
    kind: Any = Trainer
    if case == "TRL":
        import trl

        kind = trl.SFTTrainer
        args = trl.SFTConfig(**common, bf16=False, gradient_checkpointing=False)
        rows = [{"prompt": "Tom", "completion": " has a pen." * n} for n in range(1, 9)]
    else:
        args = TrainingArguments(**common)
        ids = torch.randint(1, 397, (8, 12), generator=torch.Generator().manual_seed(0))
        # In the first batch the second process has no label.
        rows = [
            {"input_ids": row, "labels": [-100] * (12 if n in (2, 3) else n) + row[n:]}
            for n, row in enumerate(ids.tolist())
        ]
        rows = [{**row, "labels": row["labels"][:12]} for row in rows]
    model = AutoModelForCausalLM.from_pretrained(folder / CASES[case], dtype=dtype)
    if processes > 1:
        with_our_head(model, case)

    class InOrder(kind):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    tokenizer = {"processing_class": copy.copy(TOKENIZER)} if case == "TRL" else {}
    trainer = InOrder(model, args, train_dataset=Dataset.from_list(rows), **tokenizer)
    trainer.train()
    return torch.cat([whole(p).flatten().double() for p in trainer.model.parameters()])


def with_our_head(model: Any, case: str) -> None:
    if case == "TRL":
        from latro_kernels.integrations.trl import patch_trl

        patch_trl()
    else:
        fused_head(model)


def whole(parameter: Any) -> Tensor:
    """Return a weight, which ZeRO-3 may have sharded."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def main() -> None:
    """Run one of two processes: its arguments are the folder for the weights, and the case."""
    from tests.latro.zero3_on_cpu import name_the_backend, settings

    folder, case = Path(sys.argv[1]), sys.argv[2]
    name_the_backend()
    config = {**settings(), "zero_allow_untested_optimizer": True}
    weights = two_updates(case, folder, 2, use_cpu=False, deepspeed=config)
    if os.environ["RANK"] == "0":
        torch.save(weights, folder / "weights.pt")


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("case", CASES)
def test_weights_under_zero3_are_those_of_one_process(
    case: str, tmp_path: Path, warm: WarmProcess
) -> None:
    if case == "TRL":
        pytest.importorskip("trl", reason="needs trl, of pip install '.[test]'")
    model_of(CASES[case]).save_pretrained(tmp_path / CASES[case])
    warm.run_together(__name__, [tmp_path, case], tmp_path / "printed", processes=2)
    ours = torch.load(tmp_path / "weights.pt")
    plain = two_updates(case, tmp_path)
    truth = two_updates(case, tmp_path, dtype="float64")
    before = AutoModelForCausalLM.from_pretrained(tmp_path / CASES[case])
    assert (truth - torch.cat([p.flatten() for p in before.parameters()])).abs().max() > 1e-3
    assert (ours - truth).abs().max() <= 2 * (plain - truth).abs().max() + 1e-5
