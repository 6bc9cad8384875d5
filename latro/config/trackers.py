"""Which trackers a run may report to."""

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
    """Refuse trackers that cannot be reported to, before a model is loaded for nothing.

    Raises:
        ValueError: an unknown name, or one whose package is not installed.
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
