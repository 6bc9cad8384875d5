"""LaTRO on Hugging Face's Trainer: a language model rewarded by its own answer likelihood.

    from latro import LatroConfig, LatroTrainer, SftConfig, SftTrainer

The commands are `python -m latro.train`, `latro.sft`, `latro.evaluate` and `latro.probe`.
"""

from __future__ import annotations

from latro.config.training import LatroConfig, SftConfig
from latro.sft_trainer import SftTrainer
from latro.trainer import LatroTrainer

__all__ = ["LatroConfig", "LatroTrainer", "SftConfig", "SftTrainer"]
__version__ = "0.1.0"
