"""`python -m latro.probe`: measure how likely answers are without and with rationales.

It writes a JSON file and a picture beside it; `latro.evaluation.likelihood` says what is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
from latro.evaluation.likelihood import KINDS, ProbeSettings, draw, probe_model, summary
from latro.files import check_output, finite, replacing, write_json
from latro.loading import load_model
from latro.model.scoring import Scorer
from latro.problems import load_held_out, load_task
from latro.run.folder import lock_of, locked_by_all
from latro.terminal import Terminal


@dataclass
class ProbeArguments(EngineArguments):
    """How to probe, and where to write the result."""

    _argument_group_name = "probe"

    output: str = setting("probe.json", "The JSON file to write; the picture goes beside it.")
    overwrite: bool = setting(False, "Write over an output that is there already.")
    eval_split: str = setting(
        "validation",
        "The problems to probe: validation, since the result may guide training, or test.",
    )
    num_eval_examples: int | None = setting(None, "Number of problems; without it, all.")
    num_samples: int = setting(4, "Sampled rationales per problem; 0: only the greedy one.")
    max_completion_length: int = setting(500, "The longest rationale, in tokens.")
    temperature: float = setting(1.0, "Temperature of the policy, in sampling and in scoring.")
    batch_size: int = setting(512, "Problems that are sampled together.")
    seed: int = setting(42, "Decides the samples.")
    backend: str = setting("auto", "Backend of the kernels: auto, reference, cpu, triton or cuda.")

    def __post_init__(self) -> None:
        check_settings(self)
        self.check_engine(self.temperature)


def probe(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command, and return the content of the JSON file.

    Raises:
        ValueError: settings, model or data are bad; nothing is then written.
    """
    model_args, data_args, args = parse_arguments(
        (ModelArguments, DataArguments, ProbeArguments), argv, prog="python -m latro.probe"
    )
    sources = (data_args.dataset_name, data_args.dataset_path, model_args.model_name_or_path)
    check_output(args.output, *sources, beside=(".png",))
    # Before the model is loaded, since this selects the process's device.
    processes = PartialState(cpu=not torch.cuda.is_available())
    with locked_by_all(lock_of(args.output), f"output: {args.output}"):
        return _probe(model_args, data_args, args, processes=processes)


def _probe(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: ProbeArguments,
    *,
    processes: PartialState,
) -> dict[str, Any]:
    picture = Path(args.output).with_suffix(".png")
    for path in (Path(args.output), picture):
        if path.exists() and not args.overwrite:
            raise ValueError(
                f"output: {path} is there already; name another file, or pass --overwrite true"
            )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    settings = ProbeSettings(
        num_samples=args.num_samples,
        max_completion_length=args.max_completion_length,
        batch_size=args.batch_size,
        temperature=args.temperature,
        seed=args.seed,
    )
    task = load_task(data_args)
    dataset = load_held_out(
        task, split=args.eval_split, args=data_args, num_examples=args.num_eval_examples
    )
    model, tokenizer = load_model(model_args)
    scorer = Scorer(model, temperature=args.temperature, backend=args.backend)
    records = probe_model(
        scorer,
        tokenizer=tokenizer,
        task=task,
        dataset=dataset,
        settings=settings,
        engine=load_engine(args, model, tokenizer, folder=picture.parent, processes=processes),
        accelerator=processes,
    )
    result: dict[str, Any] = {
        "summary": summary(records),
        "model": asdict(model_args),
        "data": asdict(data_args),
        "settings": asdict(args),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "problems": records,
    }
    if not processes.is_main_process:
        return result
    with replacing(picture) as temporary:
        draw(records).savefig(temporary, format="png", dpi=120)
        write_json(args.output, finite(result))
    console = Terminal()
    console.print(_table(f"{task.description}, {len(dataset)} problems", result["summary"]))
    if "gold" not in result["summary"]:
        console.print(f"{task.description} has no written rationales: they are left out")
    console.print(f"written to {args.output} and {picture}")
    return result


def _table(title: str, kinds: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title=title, caption="nats; ± one standard error over problems")
    for column in ("rationale", "log π(y|·)", "per token", "gain", "per token", "it helps"):
        table.add_column(column, justify="left" if column == "rationale" else "right")
    for kind, figures in kinds.items():
        cells = [_with_error(figures["sequence"]), f"{figures['token']['mean']:.3f}"]
        if "helps" in figures:
            cells += [
                _with_error(figures["sequence_gain"]),
                f"{figures['token_gain']['mean']:+.3f}",
                f"{figures['helps']:.1%}",
            ]
        table.add_row(KINDS[kind], *cells)
    return table


def _with_error(figure: Mapping[str, float]) -> str:
    return f"{figure['mean']:.2f} ± {figure['stderr']:.2f}"


def main() -> None:
    """Run the command, and exit with a code of `latro.errors.exit_with`."""
    exit_with("latro.probe", probe)


if __name__ == "__main__":
    main()
