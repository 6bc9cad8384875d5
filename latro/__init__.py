"""LaTRO on Hugging Face's Trainer: a language model rewarded by its own answer likelihood.

    from latro import LatroConfig, LatroTrainer

`python -m latro.train` and `python -m latro.evaluate` are the command lines.
"""

from __future__ import annotations

from latro.config import LatroConfig
from latro.trainer import LatroTrainer

__all__ = ["LatroConfig", "LatroTrainer"]
__version__ = "0.1.0"
