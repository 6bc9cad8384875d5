"""Define the study: cells, each a chain of commands, and their common settings.

The main cells are {base, SFT on answers, SFT on worked rationales, LaTRO} × architecture × task ×
seed. An ablation changes one setting of LaTRO on the model that ships (`SHIPPED`); the value that
the main cells have is not run again. The tuning cells compare learning rates of SFT on that model
and validation problems.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from latro.config.ranges import at_least
from studies.cells import Cell, check_seeds, flags
from studies.replicate.pretrain import SHIPPED

ARCHITECTURES = ("llama", "mistral", "phi3")
TASKS = ("arithmetic", "arithmetic_choice")
METHODS = MappingProxyType(
    {
        "base": "base",
        "sft-answer": "SFT, answers",
        "sft-rationale": "SFT, worked rationales",
        "latro": "LaTRO",
    }
)

MAJORITY = (1, 2, 4, 8)
"""The k of maj@k; the largest is the number of samples per problem."""

LATRO = MappingProxyType(
    {
        "objective": "latro",
        "num_generations": 8,
        "beta": 0.05,
        "kl": "reward",
        "answer_weight": 1.0,
        "max_completion_length": 64,
        "temperature": 1.0,
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "linear",
    }
)
# As many updates as LaTRO, of as many sequences: eight times its prompts, each with one rationale.
SFT = MappingProxyType({"per_device_train_batch_size": 64, "lr_scheduler_type": "linear"})
SFT_LEARNING_RATE = MappingProxyType({"sft-answer": 2e-4, "sft-rationale": 2e-4})
"""The best of `SFT_LEARNING_RATES` in the tuning cells: by greedy accuracy, then by maj@8."""

SFT_LEARNING_RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3)

ABLATIONS: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "num_generations": (2, 4, 8, 16),
        "beta": (0.0, 0.05, 0.25, 1.0),
        "answer_weight": (0.0, 0.5, 1.0),
        "max_completion_length": (16, 32, 64),
        "kl": ("reward", "k3", "exact"),
        "objective": ("latro", "verifree", "jepo", "rlpr", "sft"),
    }
)
"""The values of each setting that is varied, the main cells' one among them."""


@dataclass(frozen=True)
class Scale:
    """The size of a study.

    Args:
        seeds: seeds of the main cells; ablations use the first ones, tuning the first.
        ablation_seeds: number of seeds of each ablation.
        max_steps: updates of each training run.
        num_eval_examples: held-out problems of each evaluation.
        pretrain_steps: steps of each base model but the one that ships; None: `pretrain`'s default.

    Raises:
        ValueError: a setting is out of its range.
    """

    seeds: tuple[int, ...] = (1, 2, 3)
    ablation_seeds: int = 3
    max_steps: int = 80
    num_eval_examples: int = 200
    pretrain_steps: int | None = None

    def __post_init__(self) -> None:
        check_seeds(self.seeds)
        if not 0 <= self.ablation_seeds <= len(self.seeds):
            raise ValueError(
                f"ablation_seeds: expected 0 to {len(self.seeds)}, the number of seeds, "
                f"got {self.ablation_seeds}"
            )
        for name in ("max_steps", "num_eval_examples", "pretrain_steps"):
            value = getattr(self, name)
            if value is not None:
                at_least(name, value, 1)


def cells(scale: Scale) -> list[Cell]:
    """Return all cells, in the order in which they should run.

    The order is base models, tuning, main cells, ablations, each seed by seed, so that a study
    which is stopped early has complete tables of fewer seeds. No two cells run the same commands.
    """
    bases: dict[tuple[str, str], Cell | None] = {SHIPPED: None}
    for architecture in ARCHITECTURES:
        for task in TASKS:
            if (architecture, task) != SHIPPED:
                # A model of arithmetic, the first of the tasks, is what others go on from.
                start = bases.get((architecture, TASKS[0]))
                bases[architecture, task] = _base_model(architecture, task, scale, start)
    everything = [base for base in bases.values() if base is not None]
    everything += _tuning(scale)
    for seed in scale.seeds:
        for (architecture, task), base in bases.items():
            for method in METHODS:
                name = f"main-{architecture}-{task}-{method}-{seed}"
                start = Cell(name, "main", architecture, task, method, seed, base=base)
                everything.append(_with_commands(start, scale))
    for seed in scale.seeds[: scale.ablation_seeds]:
        for setting, values in ABLATIONS.items():
            for value in values:
                if value != LATRO[setting]:
                    name = f"ablation-{setting}={value}-{seed}"
                    start = Cell(name, "ablation", *SHIPPED, "latro", seed)
                    everything.append(_with_commands(start, scale, {setting: value}))
    return everything


def base_folder(architecture: str, task: str) -> str:
    """Return a base model's place in the study's folder."""
    return f"base/{architecture}-{task}"


def _base_model(architecture: str, task: str, scale: Scale, start: Cell | None) -> Cell:
    folder = base_folder(architecture, task)
    start_from: tuple[str, ...] = ()
    if start is not None:
        start_from = ("--start_from", base_folder(start.architecture, start.task))
    command = (
        "studies.replicate.pretrain",
        *("--architecture", architecture, "--task", task, "--output_dir", folder),
        *start_from,
        *(() if scale.pretrain_steps is None else ("--steps", str(scale.pretrain_steps))),
    )
    name = f"base-{architecture}-{task}"
    return Cell(
        name, "base model", architecture, task, commands=(command,), base=start, result=folder
    )


def _tuning(scale: Scale) -> Iterator[Cell]:
    for method in ("sft-answer", "sft-rationale"):
        for rate in SFT_LEARNING_RATES:
            seed = scale.seeds[0]
            name = f"tuning-{method}-learning_rate={rate}-{seed}"
            start = Cell(name, "tuning", *SHIPPED, method, seed)
            yield _with_commands(start, scale, {"learning_rate": rate}, split="validation")


def _with_commands(
    cell: Cell, scale: Scale, changed: Mapping[str, Any] | None = None, split: str = "test"
) -> Cell:
    """Return `cell` with its settings and its commands: training, if any, and evaluation."""
    changed = changed or {}
    start = base_folder(cell.architecture, cell.task)
    model = () if cell.base is None else ("--model_name_or_path", start)
    limit = str({**LATRO, **changed}["max_completion_length"])
    settings: dict[str, Any] = {}
    commands: list[tuple[str, ...]] = []
    if cell.method != "base":
        settings = {**_settings(cell.method), "max_steps": scale.max_steps, **changed}
        trained = f"{cell.work}/model"
        commands.append(
            (
                *_trainer(cell.method, model, cell.task),
                *flags(settings),
                # The last model counts; the evaluations in training are of no use here.
                *("--eval_strategy", "no", "--save_strategy", "no", "--num_eval_examples", "8"),
                *("--seed", str(cell.seed), "--output_dir", trained),
            )
        )
        model = ("--model_name_or_path", trained)
    commands.append(
        (
            *("latro.evaluate", *model, "--dataset_name", cell.task, "--eval_split", split),
            *("--num_eval_examples", str(scale.num_eval_examples)),
            *("--num_samples", str(max(MAJORITY)), "--majority", *map(str, MAJORITY)),
            *("--max_completion_length", limit, "--batch_size", "50"),
            *("--seed", str(cell.seed), "--output", cell.evaluation),
        )
    )
    return Cell(
        cell.name,
        cell.part,
        cell.architecture,
        cell.task,
        cell.method,
        cell.seed,
        settings,
        changed,
        tuple(commands),
        cell.base,
    )


def _settings(method: str) -> Mapping[str, Any]:
    if method == "latro":
        return LATRO
    return {**SFT, "learning_rate": SFT_LEARNING_RATE[method]}


def _trainer(method: str, model: Sequence[str], task: str) -> tuple[str, ...]:
    if method == "latro":
        return ("latro.train", *model, "--dataset_name", task)
    target = method.partition("-")[2]
    return ("latro.sft", "--target", target, *model, "--dataset_name", task)
