"""Keep the same few held-out problems of every evaluation in `samples.jsonl`, a line for each.

    {"step": 0, "problems": [{"prompt": …, "answer": …, "text": …, "predicted": …, "correct": …}]}

`text` is the greedy completion. The model card shows the first and the last line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from latro.files import replacing

SAMPLES_FILE = "samples.jsonl"
PROBLEMS = 3


class HeldOutSamples(TrainerCallback):
    """Writes the file.

    At the start of training it is cut to the evaluations in the trainer's state: a new run drops
    all lines, and a resumed run those from after its checkpoint.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        path = Path(str(args.output_dir)) / SAMPLES_FILE
        if state.is_world_process_zero and path.exists():
            evaluated = {e["step"] for e in state.log_history if any(map(_is_evaluation, e))}
            samples = read_samples(path)
            _write(path, {step: p for step, p in samples.items() if step in evaluated})

    @staticmethod
    def keep(output_dir: str, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Write the first problems of an evaluation, given the records of `evaluate_model`."""
        problems = [
            {name: record[name] for name in ("prompt", "answer")}
            | {name: record["greedy"][0][name] for name in ("text", "predicted", "correct")}
            for record in records[:PROBLEMS]
        ]
        path = Path(output_dir) / SAMPLES_FILE
        _write(path, read_samples(path) | {step: problems})


def read_samples(path: Path) -> dict[int, list[dict[str, Any]]]:
    """Return the problems of each evaluation by its step, in order of steps; {} without a file.

    Raises:
        ValueError: the file is damaged or of another kind; the message names the line.
    """
    if not path.exists():
        return {}
    samples = {}
    # Lines end only at "\n"; `splitlines` would also cut at characters that texts may contain.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                samples[int(entry["step"])] = list(entry["problems"])
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise ValueError(
                    f"output_dir: {path}:{number}: expected an object with step and problems, as "
                    f"a run leaves them: {error!r}; move the file away"
                ) from error
    return samples


def _write(path: Path, samples: Mapping[int, Sequence[Mapping[str, Any]]]) -> None:
    lines = (
        json.dumps({"step": step, "problems": samples[step]}, ensure_ascii=False) + "\n"
        for step in sorted(samples)
    )
    with replacing(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


def _is_evaluation(name: str) -> bool:
    return name.startswith("eval_")
