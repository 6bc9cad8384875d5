"""Define the study: cells, each a chain of commands, and their common settings.

The main cells are methods × tasks × seeds, and are evaluated on test problems. A trial changes one
setting of LaTRO, or two that belong together, or the learning rate of SFT; trials are judged on
validation problems, which for GSM8K and ARC-Challenge are rows of train and of dev, so that no
choice has seen a test problem.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from latro.config.ranges import at_least
from studies.cells import Cell, check_seeds, flags

MODEL = "SmolLM2-135M-Instruct"
BASE_FOLDER = "base/smollm2"
DATA_FOLDER = "data"
"""In the study's folder: a link to the folder with raw files."""

LIMITS = MappingProxyType({"arithmetic": 64, "gsm8k": 140, "arc_challenge": 100})
"""The tasks, and the longest rationale of each in tokens."""
RAW_FILES = ("gsm8k", "arc_challenge")
"""Tasks whose problems are not generated, but read from files."""
SYSTEM_PROMPT = 'Reason step by step. Finish with "The answer is <number>".'
"""For arithmetic, whose prompts, unlike those of the others, do not say what to write."""

METHODS = MappingProxyType(
    {
        "base": "base",
        "sft-answer": "SFT, answers",
        "sft-rationale": "SFT, worked rationales",
        "latro": "LaTRO",
        "sft-latro": "SFT, then LaTRO",
    }
)
TARGETS = MappingProxyType({"sft-answer": "answer", "sft-rationale": "rationale"})
"""What the methods that are SFT alone learn."""
TRAINED_BY_LATRO = ("latro", "sft-latro")
WORKED = frozenset({"sft-rationale", "sft-latro"})
"""Methods that need worked rationales, which ARC-Challenge has not."""

LATRO = MappingProxyType(
    {
        "num_generations": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-6,
        "beta": 0.05,
        "reward_tokens": "all",
        "unfinished": "floor",
        "answer_weight_warmup_steps": 0,
    }
)
# As many sequences an update as LaTRO has.
SFT = MappingProxyType({"per_device_train_batch_size": 32, "learning_rate": 1e-5})
# Of a micro-batch: an update takes a quarter of the memory of one micro-batch, and comes out alike.
TOKEN_BUDGET = 4096
WARM_START = MappingProxyType({**SFT, "max_steps": 20})
"""The SFT on worked rationales before LaTRO: long enough for the form."""

TRIAL_TASKS = ("arithmetic", "arc_challenge")
"""A task whose rationales run into the limit, and one whose rationales end and do harm."""
TRIALS: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "learning_rate": (1e-6, 3e-6, 1e-5),
        "beta": (0.0, 0.05, 0.2),
        "num_generations": (4, 8, 16),
        "reward_tokens": ("all", "template+answer", "answer"),
        "unfinished": ("floor", "exclude"),
        "answer_weight_warmup_steps": (0, 30),
    }
)
"""Values of LaTRO's settings that are tried, the main cells' one among them."""
TOGETHER: tuple[Mapping[str, Any], ...] = (
    MappingProxyType({"reward_tokens": "answer", "unfinished": "exclude"}),
)
"""Settings that are tried together: these take away both of what makes short rationales pay."""
SFT_LEARNING_RATES = (3e-6, 1e-5, 3e-5)

MAJORITY = (1, 8)
EVALUATIONS = 3
"""Of the validation problems in each training run, apart from the one before it."""
VALIDATION_PROBLEMS = 32
"""Of each of these evaluations."""


@dataclass(frozen=True)
class Scale:
    """The size of a study.

    Args:
        seeds: seeds of the main cells; trials use the first.
        max_steps: updates of each training run.
        num_eval_examples: problems of each evaluation.

    Raises:
        ValueError: a setting is out of its range.
    """

    seeds: tuple[int, ...] = (1,)
    max_steps: int = 60
    num_eval_examples: int = 200

    def __post_init__(self) -> None:
        check_seeds(self.seeds)
        for name in ("max_steps", "num_eval_examples"):
            at_least(name, getattr(self, name), 1)


def cells(scale: Scale) -> list[Cell]:
    """Return all cells, in the order in which they should run.

    The order is the model, the main cells of each seed, trials, so that a study which is stopped
    early has a complete table.
    """
    prepare = ("studies.real_model.prepare", "--output_dir", BASE_FOLDER)
    base = Cell("base", "base model", MODEL, "", commands=(prepare,), result=BASE_FOLDER)
    everything = [base]
    for seed in scale.seeds:
        for task in LIMITS:
            for method in METHODS:
                if _has(task, method):
                    name = f"main-{task}-{method}-{seed}"
                    start = Cell(name, "main", MODEL, task, method, seed, base=base)
                    everything.append(_with_commands(start, scale))
    seed = scale.seeds[0]
    for task in TRIAL_TASKS:
        for method, changed in _trials(task):
            what = ",".join(f"{setting}={value}" for setting, value in changed.items())
            name = f"trial-{task}-{method}-{what}-{seed}"
            start = Cell(name, "trial", MODEL, task, method, seed, base=base)
            everything.append(_with_commands(start, scale, changed))
    return everything


def _has(task: str, method: str) -> bool:
    """Return whether the task has what the method learns from."""
    return task != "arc_challenge" or method not in WORKED


def _trials(task: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the method of each trial on a task, and what it changes."""
    for setting, values in TRIALS.items():
        for value in values:
            # The main cell of a task was evaluated on test problems; so its settings are run
            # once more, as the trial of the first setting.
            if value != LATRO[setting] or setting == next(iter(TRIALS)):
                yield "latro", {setting: value}
    for changed in TOGETHER:
        yield "latro", changed
    for method in (target for target in TARGETS if _has(task, target)):
        for rate in SFT_LEARNING_RATES:
            yield method, {"learning_rate": rate}


def _with_commands(cell: Cell, scale: Scale, changed: Mapping[str, Any] | None = None) -> Cell:
    """Return `cell` with its settings and its commands: training, if any, and evaluation."""
    changed = changed or {}
    trained = f"{cell.work}/model"
    settings: dict[str, Any] = {}
    commands: list[tuple[str, ...]] = []
    model = BASE_FOLDER
    if cell.method == "sft-latro":
        warm = f"{cell.work}/warm"
        commands.append(_training(cell, "sft-rationale", WARM_START, start=model, output=warm))
        model = warm
    if cell.method != "base":
        usual = SFT if cell.method in TARGETS else LATRO
        settings = {**usual, "max_steps": scale.max_steps, **changed}
        commands.append(_training(cell, cell.method, settings, start=model, output=trained))
        model = trained
    split = "validation" if cell.part == "trial" else "test"
    problems = (
        *("--model_name_or_path", model, *_data(cell.task), "--eval_split", split),
        *("--num_eval_examples", str(scale.num_eval_examples), "--seed", str(cell.seed)),
        *("--max_completion_length", str(LIMITS[cell.task])),
    )
    samples = ("--num_samples", str(max(MAJORITY)), "--majority", *map(str, MAJORITY))
    commands += [
        ("latro.probe", *problems, "--num_samples", "0", "--output", cell.probe),
        ("latro.evaluate", *problems, *samples, "--output", cell.evaluation),
    ]
    return replace(cell, settings=settings, changed=changed, commands=tuple(commands))


def _training(
    cell: Cell, method: str, settings: Mapping[str, Any], *, start: str, output: str
) -> tuple[str, ...]:
    given = (
        *("--model_name_or_path", start, *_data(cell.task), *flags(settings)),
        *("--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", "5"),
        *("--token_budget", str(TOKEN_BUDGET), "--save_strategy", "no"),
        *("--seed", str(cell.seed), "--output_dir", output),
    )
    if method in TARGETS:
        still = ("--eval_strategy", "no", "--num_eval_examples", "8")
        return ("latro.sft", "--target", TARGETS[method], *given, *still)
    every = max(1, settings["max_steps"] // EVALUATIONS)
    evaluations = (
        *("--eval_strategy", "steps", "--eval_steps", str(every)),
        *("--num_eval_examples", str(VALIDATION_PROBLEMS), "--eval_on_start", "true"),
        *("--max_completion_length", str(LIMITS[cell.task])),
    )
    return ("latro.train", *given, *evaluations)


def _data(task: str) -> tuple[str, ...]:
    if task in RAW_FILES:
        return ("--dataset_name", task, "--dataset_path", f"{DATA_FOLDER}/{task}")
    return ("--dataset_name", task, "--system_prompt", SYSTEM_PROMPT)
