"""Check which trackers a run reports to."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

# Where a module's package has another name, that comes first. transformers looks only once there is
# a model, and most of its errors are no ImportError.
_PACKAGES = {
    "azure_ml": ("azureml-sdk", "azureml"),
    "comet_ml": ("comet_ml",),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
    "codecarbon": ("codecarbon",),
    "clearml": ("clearml",),
    "dagshub": ("dagshub",),
    "flyte": ("flytekit",),
    "dvclive": ("dvclive",),
    "swanlab": ("swanlab",),
}
_OF_KUBEFLOW = "KUBEFLOW_TRAINER_SERVER_URL"


def check_trackers(report_to: Sequence[str]) -> None:
    """Refuse trackers that are not available, before a model is loaded in vain.

    Raises:
        ValueError: a name is unknown, its package is not installed, or its service is not there.
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
        if name == "kubeflow" and _OF_KUBEFLOW not in os.environ:
            raise ValueError(
                f"report_to: expected kubeflow in one of its jobs only, which sets {_OF_KUBEFLOW}"
            )
