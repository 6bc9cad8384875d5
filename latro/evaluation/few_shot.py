"""Show worked examples before a problem, and cut completions that invent more of them.

With a chat template examples are earlier turns of user and assistant. Without one they are text:

    problem␣solution ⏎⏎ problem␣solution ⏎⏎ ... problem

A solution is the row's rationale, if any, and the answer after the answer template. Problem and
solution are separated by the white space at the problem's end, or by one space if it has none.

A model that was only pre-trained does not stop at its answer: it writes the separator, an empty
line, and invents the next problem, whose answer must not be taken for this one's. So without a chat
template a completion ends where its first separator begins. No shown solution contains an empty
line (those in the data are removed), so a completion in the examples' form is never cut short.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from latro.rollout.answer_template import template_pattern
from latro.rollout.dataset_rows import batches_of
from latro.rollout.prompts import Prompt, prompt_text
from latro.rollout.sequences import decode

SEPARATOR = "\n\n"
_ROWS_AT_ONCE = 100


def draw_examples(train: Dataset, problems: Dataset, num_shots: int) -> list[dict[str, Any]]:
    """Draw rows of the training split, the same in every call, with rationales if any row has one.

    Args:
        train: rows of the task's training split.
        problems: rows that are evaluated; training rows with one of their prompts are left out.
        num_shots: number of examples, 0 or more.

    Raises:
        ValueError: there are fewer rows.
    """
    asked = {prompt_text(prompt) for prompt in problems["prompt"]}
    # Their indices, since the rows of all may not fit into memory.
    others: list[int] = []
    worked: list[int] = []
    columns = [name for name in ("prompt", "rationale") if name in train.column_names]
    rows = (row for batch in batches_of(train, columns, _ROWS_AT_ONCE) for row in batch)
    for index, (prompt, *rationale) in enumerate(rows):
        if prompt_text(prompt) not in asked:
            others.append(index)
            if any(rationale):
                worked.append(index)
    shown = worked or others
    if num_shots > len(shown):
        raise ValueError(
            f"num_shots: expected at most {len(shown)}, the training rows that can be shown and "
            f"are not evaluated, got {num_shots}; of a single file the test split is every row: "
            "take eval_split=validation, or a folder with train and test"
        )
    return [train[index] for index in random.Random(0).sample(shown, num_shots)]


def with_examples(
    dataset: Dataset,
    examples: Sequence[Mapping[str, Any]],
    answer_template: str,
    tokenizer: PreTrainedTokenizerBase,
) -> Dataset:
    """Return the dataset with examples in front of each prompt.

    Args:
        dataset: rows with the column prompt, text or messages.
        examples: rows with prompt, answer and, perhaps, rationale; if empty, nothing changes.
        answer_template: the words that an answer begins with.
        tokenizer: its chat template, if any, decides between messages and text.
    """
    if not examples:
        return dataset
    solved = [(row["prompt"], _solution(row, answer_template)) for row in examples]
    prompts: list[Prompt]
    if tokenizer.chat_template:
        prompts = [_conversation(prompt, solved) for prompt in dataset["prompt"]]
    else:
        texts = [_joined(prompt_text(prompt), solution) for prompt, solution in solved]
        shown = "".join(text + SEPARATOR for text in texts)
        prompts = [shown + prompt_text(prompt) for prompt in dataset["prompt"]]
    return dataset.remove_columns("prompt").add_column("prompt", prompts)


def cut_at_separator(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int] | None:
    """Return the tokens that lie wholly before the first separator; None: there is none."""
    text = decode(tokenizer, ids)
    end = text.find(SEPARATOR)
    if end < 0:
        return None
    # Drop the last tokens one by one: generation stops at the separator, so few follow it.
    count = len(ids)
    while count and len(decode(tokenizer, ids[:count])) > end:
        count -= 1
    return ids[:count]


def _solution(row: Mapping[str, Any], answer_template: str) -> str:
    rationale = (row.get("rationale") or "").strip()
    # Cut the rationale where it states an answer itself.
    rationale = template_pattern(answer_template).split(rationale, maxsplit=1)[0].rstrip()
    solution = f"{rationale} {answer_template.strip()} {row['answer'].strip()}".strip()
    return re.sub(r"\n\s*\n", "\n", solution)


def _joined(prompt: str, solution: str) -> str:
    return f"{prompt}{'' if prompt[-1].isspace() else ' '}{solution}"


def _conversation(prompt: Prompt, solved: Sequence[tuple[Prompt, str]]) -> list[dict[str, str]]:
    """Insert the examples as turns after the problem's own system message, if it has one."""
    own = _messages(prompt)
    system = own[:1] if own[0]["role"] == "system" else []
    turns = []
    for asked, solution in solved:
        turns += [m for m in _messages(asked) if m["role"] != "system"]
        turns.append({"role": "assistant", "content": solution})
    return [*system, *turns, *own[len(system) :]]


def _messages(prompt: Prompt) -> list[dict[str, str]]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [dict(message) for message in prompt]
