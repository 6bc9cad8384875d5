"""`python -m latro.evaluate`: accuracy of a model on a task, as a table and as JSON."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from latro.arguments import parse_arguments
from latro.config import DataArguments, ModelArguments, setting
from latro.evaluation import EvaluationSettings, evaluate_model
from latro.files import write_json
from latro.loading import load_held_out, load_model, load_task
from latro.scoring import Scorer


@dataclass
class EvaluateArguments:
    """How to evaluate, and where the result goes."""

    _argument_group_name = "evaluation"

    output: str = setting("evaluation.json", "The JSON file to write.")
    eval_split: str = setting("test", "Which problems: validation or test.")
    num_eval_examples: int | None = setting(None, "Evaluate on so many; without it, on all.")
    num_samples: int = setting(8, "Sampled completions a problem.")
    majority: list[int] = field(
        default_factory=lambda: [8], metadata={"help": "The k of maj@k, each at most num_samples."}
    )
    max_completion_length: int = setting(500, "The longest rationale, in tokens.")
    temperature: float = setting(1.0, "Of the sampled completions.")
    batch_size: int = setting(64, "Problems a batch.")
    seed: int = setting(42, "Decides the samples.")
    backend: str = setting("auto", "Of the kernels: auto, reference, cpu, triton or cuda.")
    save_completions: bool = setting(False, "Keep every completion in the JSON.")


def evaluate(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line; returns what the JSON file holds.

    Raises:
        ValueError: bad settings, model or data; nothing is then written.
    """
    model_args, data_args, args = parse_arguments(
        (ModelArguments, DataArguments, EvaluateArguments), argv, prog="python -m latro.evaluate"
    )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    settings = EvaluationSettings(
        num_samples=args.num_samples,
        majority=tuple(k for k in args.majority if args.num_samples),
        max_completion_length=args.max_completion_length,
        batch_size=args.batch_size,
        temperature=args.temperature,
        seed=args.seed,
        progress=True,
    )
    task = load_task(data_args)
    dataset = load_held_out(task, args.eval_split, data_args, args.num_eval_examples)
    model, tokenizer = load_model(model_args)
    scorer = Scorer(model, temperature=args.temperature, backend=args.backend)
    metrics, records = evaluate_model(scorer, tokenizer, task, dataset, settings)
    result = {
        "metrics": metrics,
        "problems": len(dataset),
        "model": asdict(model_args),
        "data": asdict(data_args),
        "settings": asdict(args),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    if args.save_completions:
        result["completions"] = records
    write_json(args.output, result)
    table = Table(title=f"{task.description}, {len(dataset)} problems")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}")
    Console().print(table)
    Console().print(f"written to {args.output}")
    return result


def main() -> None:
    """The command: errors in the user's input as one line, not as a traceback."""
    try:
        evaluate()
    except ValueError as error:
        sys.exit(f"latro.evaluate: {error}")


if __name__ == "__main__":
    main()
