"""Check which trackers a run reports to."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

_PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}


def check_trackers(report_to: Sequence[str]) -> None:
    """Refuse trackers that are not available, before a model is loaded in vain.

    Raises:
        ValueError: a name is unknown, or its package is not installed.
    """
    for name in report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"report_to: expected none, all, or some of {', '.join(INTEGRATION_TO_CALLBACK)}, "
                f"got {name!r}"
            )
        packages = _PACKAGES.get(name, ())
        if packages and not any(map(importlib.util.find_spec, packages)):
            raise ValueError(f"report_to: {name} is not installed; pip install {packages[0]}")
