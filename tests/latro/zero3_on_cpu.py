"""`python -m tests.latro.zero3_on_cpu`: `python -m latro.train` with DeepSpeed's ZeRO-3 on a CPU.

accelerate (1.15) hands DeepSpeed no backend where there is no GPU, and each process is a run by
itself. DeepSpeed shards over gloo as over NCCL, so this module names it; everything else is as on
GPUs.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType
from transformers import training_args

from latro import train

RECIPE = Path(__file__).parents[2] / "recipes" / "accelerate" / "zero3.yaml"


def settings() -> dict[str, Any]:
    """Return the recipe's settings as a config of DeepSpeed's own."""
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["deepspeed_config"]
    # That one is of the launcher.
    del recipe["deepspeed_multinode_launcher"]
    config = DeepSpeedPlugin(**recipe).deepspeed_config
    # The plugin's default, infinity, is no number in JSON.
    del config["steps_per_print"]
    # By default tensors as small as those of the tests' models are kept whole.
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config


def name_the_backend() -> None:
    """Let accelerate's processes be a group over gloo, and DeepSpeed compile nothing for it."""
    from deepspeed import comm

    prepare = PartialState._prepare_backend

    def over_gloo(
        self: PartialState, cpu: bool, sagemaker: bool = False, backend: str | None = None
    ) -> tuple[str | None, DistributedType]:
        found, kind = prepare(self, cpu, sagemaker, backend)
        return (found, kind) if found else ("gloo", DistributedType.MULTI_CPU)

    PartialState._prepare_backend = over_gloo
    # DeepSpeed computes in bf16 on a CPU; transformers looks for a GPU that does.
    training_args.is_torch_bf16_gpu_available = lambda: True
    # Its own reduction in shared memory, which it would take in place of gloo's. The package has
    # torch under the name of the module.
    sys.modules[f"{comm.__name__}.torch"].build_shm_op = lambda: None


def main() -> None:
    """Run `latro.train` with ZeRO-3 on a CPU."""
    name_the_backend()
    sys.argv += ["--use_cpu", "false"]
    if "ACCELERATE_USE_DEEPSPEED" not in os.environ:
        # Else `accelerate launch` has given its settings.
        sys.argv += ["--deepspeed", json.dumps(settings())]
    train.main()


if __name__ == "__main__":
    main()
