"""Load the task that a command names, and its problems; errors say what to fix."""

from __future__ import annotations

from datasets import Dataset

from latro.config.data import DataArguments
from latro.rollout.prompts import prompt_text
from latro.tasks import TASKS, Task, get_task, read_own_data


def load_task(args: DataArguments) -> Task:
    """Return the task that the arguments name, or the task of the user's own data.

    Raises:
        ValueError: there is nothing of that name, a row is malformed, or an argument does not apply
            to the task.
    """
    if args.dataset_name in TASKS:
        for name in ("dataset_config", "grader"):
            if getattr(args, name) is not None:
                raise ValueError(
                    f"{name}: expected with data of your own only, got {getattr(args, name)!r} "
                    f"with the task {args.dataset_name}"
                )
        task = get_task(args.dataset_name)
    else:
        if args.dataset_path is not None:
            raise ValueError(
                f"dataset_path: expected with one of {', '.join(sorted(TASKS))} only, got "
                f"{args.dataset_path!r} with {args.dataset_name!r}"
            )
        task = read_own_data(args.dataset_name, config=args.dataset_config, grader=args.grader)
    if args.answer_template is not None:
        task.answer_template = args.answer_template
    task.chat = args.chat
    return task


def load_splits(
    task: Task, args: DataArguments, seed: int, eval_split: str, num_eval_examples: int | None
) -> tuple[Dataset, Dataset]:
    """Return the training problems and the held-out ones, which have no prompt in common.

    Raises:
        ValueError: `load_train` or `load_held_out` raises it, or they have a prompt in common.
    """
    train = load_train(task, args, seed)
    held_out = load_held_out(task, split=eval_split, args=args, num_examples=num_eval_examples)
    trained = {prompt_text(prompt) for prompt in train["prompt"]}
    seen = sum(prompt_text(prompt) in trained for prompt in held_out["prompt"])
    if seen:
        raise ValueError(
            f"eval_split: expected problems that are not trained on; {seen} of the "
            f"{len(held_out)} of {eval_split!r} are"
        )
    return train, held_out


def load_train(task: Task, args: DataArguments, seed: int) -> Dataset:
    """Return the training problems that the arguments name, drawn with `seed`.

    Raises:
        ValueError: a file is missing or a row is malformed.
    """
    return _load(task, "train", args, args.num_train_examples, seed)


def load_held_out(task: Task, split: str, args: DataArguments, num_examples: int | None) -> Dataset:
    """Return problems of "validation" or "test", the same for every seed of a run.

    Raises:
        ValueError: a file is missing, a row is malformed, or the split is unknown.
    """
    return _load(task, split, args, num_examples, seed=0)


def _load(
    task: Task, split: str, args: DataArguments, num_examples: int | None, seed: int
) -> Dataset:
    path = args.dataset_path
    try:
        return task.load(split, dataset_path=path, num_examples=num_examples, seed=seed)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error
