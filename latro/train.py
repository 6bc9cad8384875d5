"""`python -m latro.train`: train a causal language model with LaTRO.

Without arguments it trains the small model that ships on generated word problems, which takes a few
minutes on two cores and needs no network.
"""

from __future__ import annotations

from collections.abc import Sequence

from latro.cli import run_training
from latro.config.training import LatroConfig
from latro.errors import exit_with
from latro.trainer import LatroTrainer

PROG = "latro.train"


def train(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Run the command, and return the metrics before ("base") and after training ("final").

    Raises:
        ValueError: settings, model or data are bad; the output folder is then unchanged.
        TrainingInterrupted: a signal ended the training, SIGTERM for example; there is a
            checkpoint.
    """
    return run_training(LatroTrainer, LatroConfig, argv, prog=PROG)


def main() -> None:
    """Run the command, and exit with a code of `latro.errors.exit_with`."""
    exit_with(PROG, train)


if __name__ == "__main__":
    main()
