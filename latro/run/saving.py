"""`SavingTrainer`: a Trainer whose checkpoints and models are written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from latro.errors import pushing, writing
from latro.model.adapters import has_adapter, save_vocabulary
from latro.run.checkpoints import PARTIAL, publish, publish_files, remove_partial, rotate
from latro.run.identity import Facts, write_identity


class SavingTrainer(Trainer):
    """Writes what it saves to a folder for partial files, and renames it when all is there.

    A class that trains sets `_identity`, the facts of its run that each checkpoint gets, and reads
    `_saved_step`, the update of the last checkpoint.
    """

    def __init__(self, **kwargs: Any) -> None:
        self._partial: Path | None = None
        self._saved_step: int | None = None
        self._identity: Facts = {}
        super().__init__(**kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        # The folder where the Trainer makes `checkpoint-N`; it calls this once per checkpoint.
        run_dir = super()._get_output_dir(trial)
        return run_dir if self._partial is None else str(self._partial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        self._partial = run_dir / PARTIAL
        try:
            with writing(self._partial / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"):
                self._write_checkpoint(model, trial, run_dir)
        except OSError:
            # Part of a checkpoint on a full disk is useless and takes space.
            remove_partial(run_dir)
            raise
        finally:
            self._partial = None
        self._saved_step = self.state.global_step
        if self.args.push_to_hub:
            self._push_from_checkpoint(
                str(run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            )

    def _write_checkpoint(self, model: nn.Module, trial: Any, run_dir: Path) -> None:
        super()._save_checkpoint(model, trial)
        folder = run_dir / PARTIAL / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        place = run_dir / folder.name
        if self.args.should_save:
            write_identity(folder, self._identity)
        if self.state.best_model_checkpoint == str(folder):
            self.state.best_model_checkpoint = str(place)
            if self.args.should_save:
                self.state.save_to_json(str(folder / "trainer_state.json"))
        self._on_each_disk(folder, lambda: self._finish_checkpoint(folder, run_dir))

    def _on_each_disk(self, folder: Path, publish_it: Callable[[], None]) -> None:
        """Publish what all processes wrote into `folder`, on every disk that has such a folder.

        On a shared disk all wrote into one; a node with its own disk has a folder of its own. So
        process 0 publishes first, and then each node what is still there. All processes must call
        this together.
        """
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero() and folder.exists():
            publish_it()
        self.accelerator.wait_for_everyone()
        if self.is_local_process_zero() and folder.exists():
            publish_it()
        self.accelerator.wait_for_everyone()

    def _finish_checkpoint(self, folder: Path, run_dir: Path) -> None:
        keep = {publish(folder, run_dir)}
        if self.state.best_model_checkpoint is not None:
            keep.add(Path(self.state.best_model_checkpoint))
        rotate(run_dir, self.args.save_total_limit, keep)
        remove_partial(run_dir)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        with _written_by_each_node(self.model, self.args.save_on_each_node):
            super()._save(output_dir, state_dict)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if self.args.should_save and has_adapter(model):
            save_vocabulary(model, output_dir or self.args.output_dir, state_dict)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as the Trainer does; old files stay until the whole model is written.

        Raises:
            OSError: it cannot be written, and the folder is unchanged; or it cannot be pushed.
        """
        if _internal_call and output_dir is not None:
            super().save_model(output_dir, _internal_call)
            return
        self.write_model(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def write_model(self, output_dir: str | None = None) -> None:
        """Save the model as `save_model` does, and push nothing.

        Raises:
            OSError: it cannot be written; the folder is then unchanged.
        """
        place = Path(output_dir or self.args.output_dir)
        folder = place / PARTIAL / "model"
        try:
            with writing(place):
                super().save_model(str(folder), _internal_call=True)
                self._on_each_disk(folder, lambda: self._publish_model(folder, place))
        finally:
            if self.is_local_process_zero():
                remove_partial(place)

    def _publish_model(self, folder: Path, place: Path) -> None:
        publish_files(folder, place)
        remove_partial(place)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Find or make the repository on the hub, as the Trainer does.

        Raises:
            OSError: the hub cannot be reached, or refuses.
        """
        with pushing("nothing has been trained"):
            super().init_hf_repo(token=token, private=private)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Push the output folder to the hub, as the Trainer does.

        Raises:
            OSError: the hub cannot be reached, or refuses.
        """
        with pushing(f"everything is in {self.args.output_dir}"):
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The upload runs in parallel with training, so it starts when the folder has its final
        # name.
        if self._partial is None:
            super()._push_from_checkpoint(checkpoint_folder)


@contextmanager
def _written_by_each_node(model: Any, each_node: bool) -> Iterator[None]:
    """Let the processes that save a model write its weights, and not process 0 alone.

    So transformers (5.24) has it: with `save_on_each_node` the checkpoints of the other nodes had
    all but the weights.
    """
    if not each_node:
        yield
        return
    model.should_save_on_this_rank = lambda is_main_process: is_main_process
    try:
        yield
    finally:
        del model.should_save_on_this_rank
