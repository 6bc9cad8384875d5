"""The initial model π_0 of a policy with an adapter, without a second copy of the weights.

What is trained is kept as it was at the start, and changes places with what it is now while π_0 is
asked. So the KL is exactly 0 before the first update, whatever the kind of adapter, and however
many there are. A checkpoint holds what was kept: a run that goes on has the π_0 it began with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latro.model.adapters import requires_grad_kept
from latro.model.distribution import sharded_like, writable
from latro.model.head_rows import Reference
from latro.model.packing import Batch
from latro.model.scoring import Scorer, Scores

INITIAL_FILE = "initial_adapter.safetensors"


class AdapterOff:
    """Scores head rows by the model under a policy's adapters: π_0, with the policy's weights.

    Args:
        scorer: of the policy, which is a `peft.PeftModel`; it does the work.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    def __call__(self, batch: Batch) -> Scores:
        """Return what `Scorer.__call__` does."""
        with _adapter_off(self.scorer.model):
            return self.scorer(batch)

    def reference(self, batch: Batch) -> Reference:
        """Return what `Scorer.reference` does."""
        with _adapter_off(self.scorer.model):
            return self.scorer.reference(batch)


@contextmanager
def _adapter_off(model: Any) -> Iterator[None]:
    # PEFT lets every weight of the adapter require a gradient when it is on again, also those that
    # the user had frozen.
    with requires_grad_kept(model), model.disable_adapter():
        yield


class InitialAdapter:
    """Scores head rows by a policy with other values in the place of its trained weights.

    Args:
        scorer: of the policy; it does the work.
        initial: the values by the names of the parameters that require a gradient, in their order.
        accelerator: knows the engine that may keep the weights in shards.
    """

    def __init__(
        self, scorer: Scorer, initial: Mapping[str, Tensor], accelerator: Accelerator
    ) -> None:
        self.scorer = scorer
        self.initial = initial
        self.accelerator = accelerator
        # Made when it is asked for: an engine has still to say how it keeps the weights.
        self._held: list[Tensor] | None = None

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Scores:
        """Return what `Scorer.__call__` does, without gradient."""
        with self._initial_weights():
            return self.scorer(batch)

    def reference(self, batch: Batch) -> Reference:
        """Return what `Scorer.reference` does."""
        with self._initial_weights() as trained:
            found = self.scorer.reference(batch)
            # A weight that is trained is soon another one.
            places = {p.data_ptr() for p in trained}
            weight, bias = (
                p.clone() if p is not None and p.data_ptr() in places else p
                for p in (found.weight, found.bias)
            )
            assert weight is not None
            return replace(found, weight=weight, bias=bias)

    def save(self, folder: Path) -> None:
        """Write the initial values beside a checkpoint's weights."""
        save_file(dict(self.initial), folder / INITIAL_FILE)

    @contextmanager
    def _initial_weights(self) -> Iterator[list[nn.Parameter]]:
        # By their order and not by their names, which engines change.
        trained = [p for p in self.scorer.model.parameters() if p.requires_grad]
        if self._held is None:
            self._held = [
                sharded_like(parameter, initial, self.accelerator)
                for parameter, initial in zip(trained, self.initial.values(), strict=True)
            ]
        self._exchange(trained)
        try:
            yield trained
        finally:
            self._exchange(trained)

    @torch.no_grad()
    def _exchange(self, trained: list[nn.Parameter]) -> None:
        assert self._held is not None
        with writable(self.scorer.model, trained, self.accelerator):
            # All are read before one is written to: PEFT's tied adapters share their memory.
            present = [parameter.clone() for parameter in trained]
            for parameter, other in zip(trained, self._held, strict=True):
                parameter.copy_(other)
        self._held = present
        # Within autocast, half precision copies of the weights as they were.
        torch.clear_autocast_cache()


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies on the CPU of the weights that are trained, by name."""
    return {
        name: parameter.detach().cpu().contiguous().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def initial_of_checkpoint(folder: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the trained weights as a checkpoint's run began with them; None: adapters of zeros.

    Args:
        folder: the checkpoint's.
        like: weights of the same names and shapes.

    Raises:
        ValueError: the checkpoint has others.
    """
    path = folder / INITIAL_FILE
    if not path.exists():
        return None
    found = load_file(path)
    if {n: t.shape for n, t in found.items()} != {n: t.shape for n, t in like.items()}:
        raise ValueError(
            f"resume_from_checkpoint: {path}: expected the {len(like)} weights that are trained "
            f"here, got {len(found)} of other names or shapes"
        )
    return {name: found[name] for name in like}


def adds_nothing(model: nn.Module) -> bool:
    """Return whether `model` is, to the bit, what it is without its adapters, all that is trained.

    The answer is known for LoRA and for whole copies, and False for other adapters.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    added: set[Tensor] = set()
    for module in model.modules():
        if isinstance(module, LoraLayer) and not module.lora_variant:
            # Of the two factors these are 0 in a new adapter.
            zero: list[nn.Module] = [module.lora_B, module.lora_embedding_A]
            if any(parameter.any() for part in zero for parameter in part.parameters()):
                return False
            for part in (module.lora_A, module.lora_embedding_B, *zero):
                added.update(part.parameters())
        elif isinstance(module, ModulesToSaveWrapper):
            for copy in module.modules_to_save.values():
                if not _equal(copy, module.original_module):
                    return False
                added.update(copy.parameters())
        elif isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            return False
    # LoRA can train the model's own biases, which stay when the adapter is off.
    return all(p in added for p in model.parameters() if p.requires_grad)


def _equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
