"""`python -m latro.sft`: fine-tune a causal language model on written rationales and answers.

`--target answer` trains on the answers alone. Without a model it trains the small model that ships
on the generated word problems, in about a minute on one core.
"""

from __future__ import annotations

from collections.abc import Sequence

from latro.cli import run_training
from latro.config.training import SftConfig
from latro.errors import exit_with
from latro.sft_trainer import SftTrainer

PROG = "latro.sft"


def sft(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Run the command, and return the metrics before ("base") and after training ("final").

    Raises:
        ValueError: settings, model or data are bad; the output folder is then unchanged.
        TrainingInterrupted: a signal ended the training, SIGTERM for example; there is a
            checkpoint.
    """
    return run_training(SftTrainer, SftConfig, argv, prog=PROG, small_settings="sft.yaml")


def main() -> None:
    """Run the command, and exit with a code of `latro.errors.exit_with`."""
    exit_with(PROG, sft)


if __name__ == "__main__":
    main()
