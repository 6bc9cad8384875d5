"""The policy's weights for vLLM: their names, and how they reach a server through a folder."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from latro.model.adapters import has_adapter

_WEIGHTS = re.compile(r"step-\d+-\w+")  # folders of weights, as `WeightFiles` names them


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model without adapters that computes what `model` does."""
    if not has_adapter(model):
        return model
    # Merging in place and unmerging again would round the frozen weights at every update.
    peft_model: Any = copy.deepcopy(model)
    return peft_model.merge_and_unload()


def named_weights(
    model: PreTrainedModel, weights: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the weights with the names that `save_pretrained` gives them; tensors are not copied.

    `weights`: the whole state dict, where the model itself holds only a shard of it.
    """
    whole = merged(model)
    state = whole.state_dict() if weights is None else dict(weights)
    return revert_weight_conversion(whole, state)


class WeightFiles:
    """Hands weights to a server through a folder, as safetensors.

    Args:
        folder: this process writes it and the server reads it, under the same path and as the same
            user; it is made if missing. It holds one set of weights while the server loads them,
            and none between updates. What a killed run left there is deleted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._is_locked = False
        _remove_leftovers(folder)

    def __call__(
        self,
        model: PreTrainedModel,
        step: int,
        weights: Mapping[str, Tensor] | None,
        request: Callable[..., Any],
    ) -> None:
        """Make the server load the weights; `request` sends it a request.

        The other arguments are those of `RolloutEngine.update_weights`.

        Raises:
            ConnectionError: it could not, and must be restarted.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._is_locked:
            self._is_locked = True
            weakref.finalize(self, os.close, _lock(self.folder))
        with tempfile.TemporaryDirectory(prefix=f"step-{step}-", dir=self.folder) as place:
            if weights is None:
                merged(model).save_pretrained(place)
            else:
                model.save_pretrained(place, state_dict=weights)
            try:
                request(
                    "/collective_rpc",
                    {"method": "reload_weights", "kwargs": {"weights_path": place}},
                )
            except ConnectionError as error:
                raise ConnectionError(
                    f"{error}; the server could not load {place}: it must serve the same "
                    "architecture and read that folder. Start it anew, its weights may be in pieces"
                ) from error


def _lock(folder: Path) -> int:
    """Take a shared lock on the folder: while it is held, nobody removes weights there."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    # Some network file systems cannot lock folders; then nobody removes leftovers there.
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def _remove_leftovers(folder: Path) -> None:
    """Remove weights that a killed run left, unless another run uses the folder."""
    if not folder.is_dir():
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return
    else:
        for place in folder.iterdir():
            if _WEIGHTS.fullmatch(place.name) and place.is_dir() and not place.is_symlink():
                shutil.rmtree(place)
    finally:
        os.close(descriptor)
