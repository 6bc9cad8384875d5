"""`RestoringTrainer`: a Trainer whose checkpoints are loaded as they were saved, or refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from latro.errors import reading
from latro.model.adapters import activity_kept
from latro.run.checkpoints import STATE, beside, of_all_processes
from latro.run.saving import SavingTrainer

_SHOWN_KEYS = 5

_logger = logging.getLogger(__name__)


class RestoringTrainer(SavingTrainer):
    """Loads weights, optimiser, schedule and random state of a checkpoint, and the best model."""

    _best_is_loaded = False
    """Whether the best model was loaded; a class that trains sets it to False at the start."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        with (
            reading("resume_from_checkpoint", resume_from_checkpoint),
            activity_kept(self.model),
            saved_names_known(self.model),
        ):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _load_best_model(self) -> None:
        self._best_is_loaded = True
        best = Path(self.state.best_model_checkpoint or "")
        with activity_kept(self.model), saved_names_known(self.model):
            if any(best.glob(f"*/{ADAPTER_SAFE_WEIGHTS_NAME}")):
                # Adapters of other names than "default", for which the Trainer would do nothing.
                super()._load_from_checkpoint(str(best), self.model)
            else:
                super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading("resume_from_checkpoint", checkpoint or ""):
            super()._load_optimizer_and_scheduler(checkpoint)
        scheduler = self.lr_scheduler
        if isinstance(scheduler, LambdaLR):
            # The optimiser's state holds the learning rate of a run of the old length.
            factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
            rates = [base * f for base, f in zip(scheduler.base_lrs, factors, strict=True)]
            for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            scheduler._last_lr = rates

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading("resume_from_checkpoint", checkpoint or ""):
            super()._load_rng_state(checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # The Trainer would only warn, and go on with weights that are not the checkpoint's.
        state = self.model.state_dict()
        found = {t.data_ptr() for name, t in state.items() if name not in load_result.missing_keys}
        # A checkpoint has only one of several tied weights.
        missing = [name for name in load_result.missing_keys if state[name].data_ptr() not in found]
        if missing or load_result.unexpected_keys:
            raise ValueError(
                f"resume_from_checkpoint: expected a checkpoint with the weights of "
                f"{type(self.model).__name__}, got {len(missing)} missing "
                f"({', '.join(missing[:_SHOWN_KEYS])}) and {len(load_result.unexpected_keys)} "
                f"unexpected ({', '.join(load_result.unexpected_keys[:_SHOWN_KEYS])})"
            )

    def _find_best_checkpoint(self, resumed_from: Path) -> None:
        """Name the best checkpoint by its place now, or forget one that is gone."""
        noted = json.loads((resumed_from / STATE).read_bytes()).get("best_model_checkpoint")
        if noted is None:
            return
        best = beside(resumed_from, Path(noted), Path(self.args.output_dir))
        found = all(of_all_processes(best is not None))
        if found and best is not None:
            self.state.best_model_checkpoint = str(best)
            return
        if self.is_world_process_zero():
            _logger.warning(
                "resume_from_checkpoint: the best checkpoint so far, %s, is neither there nor "
                "beside %s; the best of the evaluations from here on is taken",
                noted,
                resumed_from,
            )
        # Against the old best metric no later model might count, and none be kept.
        self.state.best_model_checkpoint = None
        self.state.best_metric = None
        self.state.best_global_step = None


@contextmanager
def saved_names_known(model: Any) -> Iterator[None]:
    """Let `model.load_state_dict` take weights by the names by which the model is saved.

    transformers saves a mixture's experts one by one, and holds them as one tensor; the Trainer
    loads a checkpoint by the names in the file.
    """
    given = model.load_state_dict

    def load(state_dict: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        if not isinstance(model, PreTrainedModel) or state_dict.keys() <= model.state_dict().keys():
            return given(state_dict, *args, **kwargs)
        # Wide enough for each of the weights; they are copied into those of the model.
        dtype = torch.promote_types(model.dtype, torch.float32)
        whole, told = type(model).from_pretrained(
            None, config=model.config, state_dict=state_dict, dtype=dtype, output_loading_info=True
        )
        found = {n: t for n, t in whole.state_dict().items() if n not in told["missing_keys"]}
        rest = {n: state_dict[n] for n in told["unexpected_keys"]}
        return given(found | rest, *args, **kwargs)

    model.load_state_dict = load
    try:
        yield
    finally:
        del model.load_state_dict
