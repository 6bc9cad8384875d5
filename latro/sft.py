"""`python -m latro.sft`: fine-tune a causal language model on written rationales and answers.

`--target answer` trains on the answers alone. Without a model the small one that ships learns the
generated word problems, in about a minute on one core.
"""

from __future__ import annotations

from collections.abc import Sequence

from latro.cli import run_training
from latro.config.training import SftConfig
from latro.errors import exit_with
from latro.sft_trainer import SftTrainer

PROG = "latro.sft"


def sft(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Run the command line; returns the metrics before ("base") and after ("final").

    Raises:
        ValueError: bad settings, model or data; the output folder is then as it was.
        TrainingInterrupted: SIGTERM or SIGINT ended the training; there is a checkpoint.
    """
    return run_training(SftTrainer, SftConfig, argv, prog=PROG, small_settings="sft.yaml")


def main() -> None:
    """The command, with exit codes as `latro.errors.exit_with` tells."""
    exit_with(PROG, sft)


if __name__ == "__main__":
    main()
