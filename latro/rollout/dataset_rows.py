"""A data set's rows: read in batches, encoded together, and checked before anything is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from datasets import Dataset
from torch import distributed
from transformers import PreTrainedModel

from latro.rollout.answer_join import AnswerJoin
from latro.rollout.answer_template import template_pattern
from latro.rollout.chat_template import leaves_out_the_user, tokenizer_name
from latro.rollout.frame import Frame
from latro.rollout.long_rope import long_rope_boundary
from latro.rollout.prompts import Prompt, encode_prompt, encode_prompts, is_prompt, prompt_text
from latro.rollout.sequences import Sample
from latro.terminal import progress_bar

_SHOWN = 60  # characters of a prompt in a message
# Of one call of template and tokenizer. More rows are no faster; more characters take more memory,
# of which a tokenizer needs about a hundred bytes a token.
_ROWS_AT_ONCE = 64
_CHARACTERS_AT_ONCE = 1 << 18
_SECONDS_UNTIL_SHOWN = 5


class Longest(NamedTuple):
    """The largest token counts over a dataset's rows; answers include template and end token."""

    answer: int
    prompt_and_answer: int
    prompt: int


def check_dataset(
    dataset: Dataset,
    name: str,
    model: PreTrainedModel,
    join: AnswerJoin,
    max_completion_length: int,
    *,
    progress: bool = True,
) -> Longest:
    """Reject a dataset with a row that would fail in the middle of a run.

    Args:
        dataset: rows with the columns prompt and answer.
        name: the name of the dataset in messages.
        model: the model, whose `max_position_embeddings` is the limit.
        join: makes the prompt's and the answer's tokens.
        max_completion_length: the longest rationale, in tokens.
        progress: whether to show a progress bar, where the check takes some seconds.

    Returns:
        The largest lengths, in tokens.

    Raises:
        TypeError: this is no `datasets.Dataset`.
        ValueError: there are no rows, a column is missing, a prompt or answer is empty or of
            another kind, an answer has the template already, the tokenizer cannot render a prompt,
            a row with a rationale of full length does not fit the model or crosses the boundary of
            its rotary frequencies (the message names the row and shows the beginning of its
            prompt); or the chat template renders two prompts alike in which users say different
            things.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(f"{name}: expected a datasets.Dataset, got {type(dataset).__name__}")
    missing = {"prompt", "answer"} - set(dataset.column_names)
    if missing:
        raise ValueError(
            f"{name}: expected the columns prompt and answer, got {dataset.column_names}"
        )
    if len(dataset) == 0:
        raise ValueError(f"{name}: expected at least one row, got none")
    tokenizer = join.tokenizer
    longest = Longest(0, 0, 0)
    boundary = long_rope_boundary(model)
    rendered = _Rendered(join.frame, name, dataset)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    columns = ["prompt", "answer"]
    for index, row, encoded in _encoded(dataset, name, join, columns, progress=progress):
        prompt, answer, ids = row["prompt"], row["answer"], encoded
        if not is_prompt(prompt):
            raise ValueError(
                f"{name}: row {index}: expected a string, or messages with role and content, as "
                f"the prompt, got {prompt!r}"
            )
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError(
                f"{name}: row {index}: expected a non-empty answer, got {answer!r}; "
                f"{_beginning(prompt)}"
            )
        if template_pattern(join.template).match(answer.strip()):
            raise ValueError(
                f"{name}: row {index}: expected an answer without the answer template "
                f"{join.template!r}, which is put before it, got {answer!r}; {_beginning(prompt)}"
            )
        if ids is None:
            try:
                ids = encode_prompt(tokenizer, prompt, join.frame)
            except ValueError as error:
                raise ValueError(f"{name}: row {index}: {error}; {_beginning(prompt)}") from error
        if not ids:
            raise ValueError(f"{name}: row {index}: the prompt has no tokens: {prompt!r}")
        rendered.add(index, prompt, ids)
        answer_tokens = len(join(ids, Sample([]), answer).answer_ids)
        longest = Longest(
            max(longest.answer, answer_tokens),
            max(longest.prompt_and_answer, len(ids) + answer_tokens),
            max(longest.prompt, len(ids)),
        )
        needed = len(ids) + max_completion_length + answer_tokens
        if limit is not None and needed > limit:
            raise ValueError(
                f"{name}: row {index}: a prompt of {len(ids)} tokens with a rationale of "
                f"{max_completion_length} and its answer takes {needed} positions, but the model "
                f"has {limit}; lower max_completion_length or drop the row; {_beginning(prompt)}"
            )
        # The model never reads the answer's last token.
        if boundary is not None and max_completion_length and len(ids) <= boundary < needed - 1:
            raise ValueError(
                f"{name}: row {index}: a prompt of {len(ids)} tokens with a rationale of "
                f"{max_completion_length} and its answer goes past the {boundary} up to which the "
                "model has its short rotary frequencies, and a rationale sampled with these would "
                "be scored with the long ones; lower max_completion_length or drop the row; "
                f"{_beginning(prompt)}"
            )
    if tokenizer.chat_template and leaves_out_the_user(tokenizer):
        raise ValueError(
            f"{name}: the chat template of {tokenizer_name(tokenizer)} leaves out what users say"
        )
    return longest


def encode_each(dataset: Dataset, join: AnswerJoin) -> Iterator[list[int]]:
    """Yield the prompt's token ids of each row of a dataset that passed `check_dataset`."""
    for _, row, ids in _encoded(dataset, "dataset", join, ["prompt"], progress=False):
        yield encode_prompt(join.tokenizer, row["prompt"], join.frame) if ids is None else ids


def _encoded(
    dataset: Dataset, name: str, join: AnswerJoin, columns: list[str], *, progress: bool
) -> Iterator[tuple[int, dict[str, Any], list[int] | None]]:
    """Yield index, values and prompt's token ids of every row, and show how far it is.

    The ids are None from where prompts cannot be encoded together: one of them is none, or is
    refused, or a template takes long. So whoever encodes them one by one finds which.
    """
    together = True
    index = 0
    with progress_bar(
        total=len(dataset),
        desc=f"checking {name}",
        unit="row",
        delay=_SECONDS_UNTIL_SHOWN,
        disable=not progress or not _is_main_process(),
    ) as bar:
        for rows in _portions(dataset, columns):
            encoded: list[list[int]] | None = None
            if together and all(is_prompt(row["prompt"]) for row in rows):
                with contextlib.suppress(ValueError):
                    prompts = [row["prompt"] for row in rows]
                    encoded = encode_prompts(join.tokenizer, prompts, join.frame)
            together = encoded is not None
            for place, row in enumerate(rows):
                yield index, row, None if encoded is None else encoded[place]
                index += 1
                bar.update()


def _is_main_process() -> bool:
    return not distributed.is_initialized() or distributed.get_rank() == 0


def batches_of(
    dataset: Dataset, columns: Sequence[str], rows: int
) -> Iterator[list[tuple[Any, ...]]]:
    """Yield the values of some columns, of so many rows at a time; others are not read."""
    # A transform of the user's own may read any column.
    whole = dataset.format["type"] == "custom"
    read = dataset if whole else dataset.select_columns(list(columns))
    for batch in read.iter(batch_size=rows):
        yield list(zip(*(batch[column] for column in columns), strict=True))


def _portions(dataset: Dataset, columns: list[str]) -> Iterator[list[dict[str, Any]]]:
    """Yield the values of some columns, of as many rows as are encoded at once."""
    for batch in batches_of(dataset, columns, _ROWS_AT_ONCE):
        portion: list[dict[str, Any]] = []
        characters = 0
        for values in batch:
            portion.append(dict(zip(columns, values, strict=True)))
            prompt = portion[-1]["prompt"]
            characters += len(prompt_text(prompt)) if is_prompt(prompt) else 0
            if characters >= _CHARACTERS_AT_ONCE:
                yield portion
                portion, characters = [], 0
        if portion:
            yield portion


class _Rendered:
    """Checks that a chat template renders different prompts of a dataset differently."""

    def __init__(self, frame: Frame, name: str, dataset: Dataset) -> None:
        self.frame = frame
        self.name = name
        self.dataset = dataset
        # The first row by a hash of its ids: all prompts together may not fit into memory.
        self.first: dict[int, int] = {}

    def add(self, index: int, prompt: Prompt, ids: list[int]) -> None:
        """Raise ValueError where an earlier prompt with other user messages has the same ids."""
        tokenizer = self.frame.tokenizer
        if not tokenizer.chat_template:
            return
        first = self.first.setdefault(hash(tuple(ids)), index)
        if first == index:
            return
        other = self.dataset[first]["prompt"]
        if _said(other) != _said(prompt) and encode_prompt(tokenizer, other, self.frame) == ids:
            raise ValueError(
                f"{self.name}: row {index}: the chat template of {tokenizer_name(tokenizer)} "
                f"renders it as it does row {first}, whose users say something else; "
                f"{_beginning(prompt)}"
            )


def _said(prompt: Prompt) -> list[str]:
    """Return the user messages of a prompt, without what a template may be expected to drop."""
    said = (
        [prompt]
        if isinstance(prompt, str)
        else [message["content"] for message in prompt if message["role"] == "user"]
    )
    return [" ".join(text.casefold().split()) for text in said]


def check_rationales(
    dataset: Dataset,
    name: str,
    model: PreTrainedModel,
    join: AnswerJoin,
    *,
    progress: bool = True,
) -> None:
    """Reject a dataset with a written rationale that is too long for the model.

    Args:
        dataset: rows that passed `check_dataset`, with the columns prompt, rationale and answer.
        name: the name of the dataset in messages.
        model: the model, whose `max_position_embeddings` is the limit.
        join: makes the rationale's and the answer's tokens.
        progress: whether to show a progress bar, where the check takes some seconds.

    Raises:
        ValueError: there is such a row; the message names it and shows the beginning of its prompt.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return
    columns = ["prompt", "rationale", "answer"]
    for index, row, ids in _encoded(dataset, name, join, columns, progress=progress):
        prompt_ids = ids or encode_prompt(join.tokenizer, row["prompt"], join.frame)
        needed = len(join.written(prompt_ids, row["rationale"] or "", row["answer"]).input_ids)
        if needed > limit:
            raise ValueError(
                f"{name}: row {index}: prompt, rationale and answer take {needed} positions, but "
                f"the model has {limit}; drop the row; {_beginning(row['prompt'])}"
            )


def _beginning(prompt: Prompt) -> str:
    """Return the beginning of a prompt for messages, where a row's index may not be its line."""
    text = " ".join(prompt_text(prompt).split())
    return f"its prompt begins {text[:_SHOWN]!r}"
