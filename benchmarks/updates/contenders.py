"""Contenders of `step.py`: `LatroTrainer`, TRL's `RLOOTrainer`, and what all have in common.

Each has models of its own, equal to the others', and does one update of given rollouts or one whole
step with sampling, up to the gradient; what the optimiser does is the same for all and is left out.
`counted` tells what went through trunk and head, from hooks on the modules that did the work.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.updates.problem import StepProblem, stops_by_chance
from latro import LatroConfig, LatroTrainer
from latro.rollout.sequences import Rollout
from latro.tasks import Arithmetic

Groups = Sequence[Sequence[Rollout]]
BETA = 0.05


@dataclass
class Pass:
    """One forward of the policy or the reference.

    `tokens` are those that the trunk read, padding included, and `rows` those that the head took.
    """

    model: str
    with_gradient: bool
    tokens: int
    rows: int = 0


class Contender(ABC):
    """One way to do an update.

    Attributes:
        name: in tables.
        counts_steps: whether what a step sends through trunk and head can be counted.
        problem: the sizes, prompts and samples of the update.
        model: the policy; its gradients are what an update adds to.
        ref_model: π_0.
    """

    name: str
    counts_steps = True
    ref_model: PreTrainedModel

    def __init__(self, problem: StepProblem) -> None:
        self.problem = problem
        self.model, self.ref_model = problem.models()

    @abstractmethod
    def update(self, groups: Groups) -> Tensor:
        """Score given rollouts and backpropagate; return the loss, detached."""

    @abstractmethod
    def step(self) -> None:
        """Sample for the problem's prompts, then score and backpropagate."""

    @contextmanager
    def counted(self) -> Iterator[list[Pass]]:
        """Add every forward through a trunk, for as long as this is entered, to a list."""
        passes: list[Pass] = []

        def read(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
            passes.append(Pass(name, torch.is_grad_enabled(), args[0].numel()))

        def took(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            passes[-1].rows += args[0].shape[:-1].numel()

        with ExitStack() as stack:
            for name, model in (("policy", self.model), ("reference", self.ref_model)):
                trunk, head = model.get_input_embeddings(), model.get_output_embeddings()
                stack.callback(trunk.register_forward_pre_hook(partial(read, name)).remove)
                stack.callback(head.register_forward_pre_hook(took).remove)
            yield passes

    def prompt_tokens(self, passes: Sequence[Pass]) -> int:
        """Return how many tokens of prompts the step read whose forwards `passes` are."""
        return passes[0].tokens

    def trainer_settings(self, folder: Path) -> dict[str, object]:
        """Return the settings that all trainers of the library have in common here."""
        return {
            "output_dir": str(folder),
            "num_generations": self.problem.setting.K,
            "max_completion_length": self.problem.setting.rationale[1],
            "use_cpu": self.problem.device.type == "cpu",
            "disable_tqdm": True,
            "report_to": "none",
        }


class Ours(Contender):
    """`LatroTrainer` itself; for an update alone its rollout is replaced by the given ones.

    Args:
        problem: what is worked on.
        folder: for what a trainer writes.
        one_batch: whether all sequences go through at once; else by the trainer's default.
        settings: more of `LatroConfig`.

    Attributes:
        lengths: of the rationales of the last step.
    """

    name = "latro"

    def __init__(
        self, problem: StepProblem, folder: Path, one_batch: bool = False, **settings: object
    ) -> None:
        super().__init__(problem)
        self.lengths: list[list[int]] = []
        rows = problem.rows()
        budget = {"token_budget": 1 << 40} if one_batch else {}
        given = {"beta": BETA, "per_device_train_batch_size": problem.setting.G} | budget | settings
        config = LatroConfig(**self.trainer_settings(folder) | given)
        self._trainer = LatroTrainer(
            self.model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=problem.tokenizer,
            task=Arithmetic(),
            ref_model=self.ref_model,
        )
        self._inputs = {"examples": rows}
        self._token_budget = config.token_budget

    def update(self, groups: Groups) -> Tensor:
        with mock.patch.object(self._trainer, "rollout", return_value=groups):
            loss = self._trainer.training_step(self.model, self._inputs)
        if self._trainer.update.token_budget < self._token_budget:
            raise torch.OutOfMemoryError("the trainer had to split its batches")
        return loss

    def step(self) -> None:
        """Do a step as in training; `lengths` then holds the lengths that were drawn."""
        sample = self._trainer.rollout

        def rollout(examples: Sequence[dict[str, str]]) -> Groups:
            end = self.problem.tokenizer.eos_token_id
            with stops_by_chance(self._trainer.engine.model, self.problem.setting, end):
                groups = sample(examples)
            self.lengths = [[len(r.sampled_ids) for r in group] for group in groups]
            return groups

        with mock.patch.object(self._trainer, "rollout", rollout):
            self._trainer.training_step(self.model, self._inputs)

    def prompt_tokens(self, passes: Sequence[Pass]) -> int:
        # Prompts may be read one by one. All but a rationale's last token are read in decoding.
        first = next(i for i, one in enumerate(passes) if one.model == "reference")
        decoded = sum(length - 1 for group in self.lengths for length in group)
        return sum(one.tokens for one in passes[:first]) - decoded


class OursCompiled(Ours):
    """`LatroTrainer` with `--rollout_compile`; hooks that count would become part of the graph.

    It is compiled in its first step.
    """

    name = "latro (compiled)"
    counts_steps = False

    def __init__(
        self, problem: StepProblem, folder: Path, one_batch: bool = False, **settings: object
    ) -> None:
        super().__init__(problem, folder, one_batch, rollout_compile=True, **settings)


class OursCompiledBf16(OursCompiled):
    """The same, with `--rollout_dtype bfloat16`: samples come of a copy of the policy."""

    name = "latro (compiled, bf16 rollouts)"

    def __init__(self, problem: StepProblem, folder: Path, one_batch: bool = False) -> None:
        super().__init__(problem, folder, one_batch, rollout_dtype="bfloat16")


class Trl(Contender):
    """TRL's `RLOOTrainer`, by its default of 8 sequences; it can do a part of the work.

    Its rewards come from functions that are given no model, and its loss has no term for an answer:
    so it scores and updates x⊕z alone, with a reward that costs nothing, and neither log π(y|x⊕z)
    nor its gradient is in its figures.

    Raises:
        ImportError: TRL is not installed.
    """

    name = "trl (x⊕z only)"

    def __init__(self, problem: StepProblem, folder: Path, one_batch: bool = False) -> None:
        from trl import RLOOConfig

        super().__init__(problem)
        # It loads its reference from where the policy says that it came from.
        self.ref_model.save_pretrained(folder / "reference")
        self.model.config._name_or_path = str(folder / "reference")
        setting, rows = problem.setting, problem.rows()
        sequences = setting.G * setting.K
        # Its default batch of 8 where that divides the sequences.
        batch = sequences if one_batch else 8 if sequences % 8 == 0 else setting.K
        config = RLOOConfig(
            **self.trainer_settings(folder),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=sequences // batch,
            beta=BETA,
            bf16=False,  # the weights have their dtype already
            activation_checkpointing=False,
            save_strategy="no",
        )
        self._trainer = self.trainer_class(
            self.model,
            reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=problem.tokenizer,
        )
        self.ref_model = self._trainer.ref_model
        self._micro_steps = self._trainer.current_gradient_accumulation_steps = sequences // batch
        self._inputs = [row for row in rows for _ in range(setting.K)]

    @property
    def trainer_class(self) -> type:
        from trl import RLOOTrainer

        return RLOOTrainer

    def update(self, groups: Groups) -> Tensor:
        sampled = [rollout.sampled_ids for group in groups for rollout in group]
        with mock.patch.object(self._trainer, "_generate_single_turn", return_value=sampled):
            return self._train()

    def step(self) -> None:
        end = self.problem.tokenizer.eos_token_id
        with stops_by_chance(self.model, self.problem.setting, end):
            self._train()

    def _train(self) -> Tensor:
        losses = [
            self._trainer.training_step(self.model, self._inputs, None)
            for _ in range(self._micro_steps)
        ]
        return torch.stack(losses).sum()

    @contextmanager
    def counted(self) -> Iterator[list[Pass]]:
        """Count rows where TRL multiplies by the head's weight, as it does not call the head."""
        import trl.trainer.utils

        chunked = trl.trainer.utils._ChunkedLogProbFunction

        def apply(hidden: Tensor, *args: object) -> object:
            passes[-1].rows += hidden.shape[0]
            return chunked.apply(hidden, *args)

        watched = mock.patch.object(
            trl.trainer.utils, "_ChunkedLogProbFunction", SimpleNamespace(apply=apply)
        )
        with super().counted() as passes, watched:
            yield passes


class TrlSharedPrefix(Trl):
    """TRL's `RLOOTrainer` with every prompt once through the trunk."""

    name = "trl, SharedPrefix (x⊕z only)"

    @property
    def trainer_class(self) -> type:
        from latro.integrations.trl import SharedPrefix

        class PackedRLOO(SharedPrefix, super().trainer_class):  # type: ignore[misc]
            pass

        return PackedRLOO
