"""`python -m latro.evaluate`: measure a model's accuracy on a task, and write every completion.

A killed evaluation resumes from its lines when it is started again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from rich.table import Table
from transformers.utils import logging as transformers_logging

from latro.config.command_line import parse_arguments
from latro.config.data import DataArguments
from latro.config.engine import EngineArguments
from latro.config.fields import check_settings, setting
from latro.config.model import ModelArguments
from latro.engines.make import load_engine
from latro.errors import exit_with
from latro.evaluation.accuracy import EvaluationSettings, evaluate_model
from latro.evaluation.few_shot import draw_examples
from latro.evaluation.metrics import intervals_of
from latro.evaluation.resume import Journal, crc32_of_each, weights_crc32
from latro.files import check_output, finite, write_json
from latro.loading import load_model
from latro.model.adapters import without_wrapper
from latro.model.scoring import Scorer
from latro.problems import load_held_out, load_task, load_train
from latro.rollout.sequences import eos_token_ids
from latro.run.folder import lock_of, locked_by_all
from latro.run.identity import config_facts
from latro.terminal import Terminal


@dataclass
class EvaluateArguments(EngineArguments):
    """How to evaluate, and where to write the result."""

    _argument_group_name = "evaluation"

    output: str = setting(
        "evaluation.json", "The JSON file to write; beside it goes .jsonl, one line per problem."
    )
    overwrite: bool = setting(False, "Start anew even if the output has lines already.")
    eval_split: str = setting("test", "The problems to evaluate on: validation or test.")
    num_eval_examples: int | None = setting(None, "Number of problems; without it, all.")
    num_shots: int = setting(
        0, "Number of worked examples, from the training split, before each problem."
    )
    num_samples: int = setting(8, "Sampled completions per problem; 0: greedy only.")
    majority: list[int] | None = field(
        default=None, metadata={"help": "The k of maj@k; without it, num_samples."}
    )
    max_completion_length: int = setting(500, "The longest rationale, in tokens.")
    temperature: float = setting(1.0, "Temperature of the sampled completions.")
    batch_size: int = setting(
        512,
        "Problems that are sampled and written together; more keep the engine full, and results do "
        "not depend on it.",
    )
    seed: int = setting(42, "Decides the samples.")
    backend: str = setting("auto", "Backend of the kernels: auto, reference, cpu, triton or cuda.")

    def __post_init__(self) -> None:
        check_settings(self)
        self.check_engine(self.temperature)
        if self.majority is None:
            self.majority = [self.num_samples] if self.num_samples else []
        if self.num_shots < 0:
            raise ValueError(f"num_shots: expected 0 or more, got {self.num_shots}")


def evaluate(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command, and return the content of the JSON file.

    Raises:
        ValueError: settings, model or data are bad, or the output has lines of another evaluation;
            nothing is then written.
    """
    model_args, data_args, args = parse_arguments(
        (ModelArguments, DataArguments, EvaluateArguments), argv, prog="python -m latro.evaluate"
    )
    lines = Path(args.output).with_suffix(".jsonl")
    journal = lines.with_suffix(".settings.json")
    sources = (data_args.dataset_name, data_args.dataset_path, model_args.model_name_or_path)
    check_output(args.output, *sources, beside=(".jsonl", ".settings.json"))
    if Path(args.output).exists() and not journal.exists():
        raise ValueError(
            f"output: {args.output} is there without {journal.name}, which would say that an "
            "evaluation wrote it; name another file"
        )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    settings = EvaluationSettings(
        num_samples=args.num_samples,
        majority=tuple(args.majority),
        max_completion_length=args.max_completion_length,
        batch_size=args.batch_size,
        temperature=args.temperature,
        seed=args.seed,
        progress=True,
    )
    task = load_task(data_args)
    dataset = load_held_out(
        task, split=args.eval_split, args=data_args, num_examples=args.num_eval_examples
    )
    examples = []
    if args.num_shots:
        examples = draw_examples(load_train(task, data_args, seed=0), dataset, args.num_shots)
    # Before the model is loaded, since this selects the process's device.
    processes = PartialState(cpu=not torch.cuda.is_available())
    model, tokenizer = load_model(model_args)
    scorer = Scorer(model, temperature=args.temperature, backend=args.backend)
    result: dict[str, Any] = {
        "problems": len(dataset),
        "model": asdict(model_args),
        "data": asdict(data_args),
        "settings": asdict(args),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    # Settings that do not change the lines, so that an evaluation may resume with other ones.
    apart = {"output", "overwrite", "batch_size", "majority", "vllm_url", "vllm_weights_dir"}
    apart |= {"vllm_sync", "vllm_gpu_memory_utilization", "vllm_max_model_length"}
    # The weights tell which file they came from. A path tells nothing of what lies there now.
    named = {k: v for k, v in result["model"].items() if k != "gguf_file"}
    identity = {
        "model": {
            **named,
            **config_facts(without_wrapper(model)),
            "weights": weights_crc32(model),
            "ends": eos_token_ids(model, tokenizer),
            "device": model.device.type,
        },
        "data": {**result["data"], "rows": crc32_of_each(dataset)[0]},
        "settings": {k: v for k, v in result["settings"].items() if k not in apart},
        "versions": result["versions"],
    }
    started = time.perf_counter()
    with locked_by_all(lock_of(args.output), f"output: {args.output}"):
        engine = load_engine(args, model, tokenizer, folder=lines.parent, processes=processes)
        metrics, records = evaluate_model(
            scorer,
            tokenizer=tokenizer,
            task=task,
            dataset=dataset,
            settings=settings,
            engine=engine,
            accelerator=processes,
            examples=examples,
            journal=Journal(lines, identity, args.overwrite),
        )
        intervals = intervals_of(records, settings.majority)
        result = {
            "metrics": metrics,
            "intervals": intervals,
            **result,
            "examples": examples,
            "seconds": time.perf_counter() - started,
        }
        if processes.is_main_process:
            write_json(args.output, finite(result))
    if processes.is_main_process:
        title = f"{task.description}, {len(dataset)} problems"
        if examples:
            title += f", {len(examples)}-shot"
        terminal = Terminal()
        terminal.print(_table(title, metrics, intervals))
        terminal.print(f"written to {args.output}, and one line per problem to {lines}")
    return result


def _table(
    title: str, metrics: Mapping[str, float], intervals: Mapping[str, Sequence[float]]
) -> Table:
    table = Table(title=title)
    for column in ("metric", "value", "95 % interval"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, value in metrics.items():
        interval = " – ".join(f"{end:.4f}" for end in intervals.get(name, ()))
        table.add_row(name, f"{value:.4f}", interval)
    return table


def main() -> None:
    """Run the command, and exit with a code of `latro.errors.exit_with`."""
    exit_with("latro.evaluate", evaluate)


if __name__ == "__main__":
    main()
