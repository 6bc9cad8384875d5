"""The tasks that ship, and a user's own data: prompts, answers, grading."""

from __future__ import annotations

from .arc_challenge import ARCChallenge
from .arithmetic import Arithmetic
from .arithmetic_choice import ArithmeticChoice
from .base import Task
from .gsm8k import GSM8K
from .own_data import GRADERS, OwnData, read_own_data
from .records import FORMATS

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Arithmetic, ArithmeticChoice, ARCChallenge, GSM8K)
}


def get_task(name: str) -> Task:
    """Return the task of that name.

    Raises:
        ValueError: there is no such task; the message lists the tasks.
    """
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(sorted(TASKS))}; got {name!r}")
    return TASKS[name]()


__all__ = [
    "FORMATS",
    "GRADERS",
    "GSM8K",
    "TASKS",
    "ARCChallenge",
    "Arithmetic",
    "ArithmeticChoice",
    "OwnData",
    "Task",
    "get_task",
    "read_own_data",
]
