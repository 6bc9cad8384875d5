"""Prompts as token ids, checked before anything is trained on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from latro.layout import long_rope_boundary
from latro.rollout import AnswerJoin, Sample

# A text, or a conversation: {"role", "content"} messages.
Prompt = str | Sequence[Mapping[str, str]]

_SHOWN = 60  # characters of a prompt in a message


def prompt_text(prompt: Prompt) -> str:
    """A prompt as one string, to show, to compare and to look up by; a model reads another form.

    A conversation of one message of the user is the string that the message holds.
    """
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a prompt: in the chat template's frame where the tokenizer has one.

    With a chat template a string is one message of the user. The template is applied once, and it
    writes its own beginning-of-sequence token, so the tokenizer adds none. Without a template a
    string, or one message of the user, is read as it is: the tokenizer adds what it always adds,
    less an end-of-sequence token at the end, and less a second token at the beginning where the
    string begins with that itself.

    Raises:
        ValueError: the template refuses the messages, or there is none and they are not one of the
            user.
    """
    if tokenizer.chat_template:
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        try:
            text = tokenizer.apply_chat_template(
                [dict(message) for message in prompt], tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise ValueError(
                f"the chat template of {_name(tokenizer)} refuses the messages: {error}"
            ) from error
        return list(tokenizer.encode(text, add_special_tokens=False))
    if not isinstance(prompt, str) and [message["role"] for message in prompt] != ["user"]:
        raise ValueError(
            f"{_name(tokenizer)} has no chat template: expected a string, or one message of the "
            f"user, as the prompt; got {len(prompt)} messages ending in {prompt[-1]['role']!r}"
        )
    ids = list(tokenizer.encode(prompt_text(prompt)))
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids.pop(0)
    return ids


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__}"


class Longest(NamedTuple):
    """The most tokens that any row of a dataset has; answers with template and end."""

    answer: int
    prompt_and_answer: int


def check_dataset(
    dataset: Dataset,
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    join: AnswerJoin,
    max_completion_length: int,
) -> Longest:
    """Reject a dataset that some row of would fail in the middle of a run.

    Args:
        dataset: with the columns prompt and answer.
        name: what the messages call it.
        model: its `max_position_embeddings` is the limit.
        tokenizer: the model's.
        join: makes the answer's tokens.
        max_completion_length: the longest rationale, in tokens.

    Returns:
        Its longest lengths.

    Raises:
        ValueError: a missing column, no rows, an empty prompt or answer, a prompt that the
            tokenizer cannot render, or a row that does not fit the model with a rationale of full
            length, or would change its rotary frequencies within one; names the row and how its
            prompt begins.
    """
    missing = {"prompt", "answer"} - set(dataset.column_names)
    if missing:
        raise ValueError(
            f"{name}: expected the columns prompt and answer, got {dataset.column_names}"
        )
    if len(dataset) == 0:
        raise ValueError(f"{name}: expected at least one row, got none")
    longest = Longest(0, 0)
    boundary = long_rope_boundary(model)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for index, (prompt, answer) in enumerate(
        zip(dataset["prompt"], dataset["answer"], strict=True)
    ):
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError(
                f"{name}: row {index}: expected a non-empty answer, got {answer!r}; "
                f"{_beginning(prompt)}"
            )
        try:
            ids = encode_prompt(tokenizer, prompt)
        except ValueError as error:
            raise ValueError(f"{name}: row {index}: {error}; {_beginning(prompt)}") from error
        if not ids:
            raise ValueError(f"{name}: row {index}: the prompt has no tokens: {prompt!r}")
        answer_tokens = len(join(ids, Sample([]), answer).answer_ids)
        longest = Longest(
            max(longest.answer, answer_tokens),
            max(longest.prompt_and_answer, len(ids) + answer_tokens),
        )
        needed = len(ids) + max_completion_length + answer_tokens
        if limit is not None and needed > limit:
            raise ValueError(
                f"{name}: row {index}: a prompt of {len(ids)} tokens with a rationale of "
                f"{max_completion_length} and its answer takes {needed} positions, but the model "
                f"has {limit}; lower max_completion_length or drop the row; {_beginning(prompt)}"
            )
        # The answer's last token is not read.
        if boundary is not None and max_completion_length and len(ids) <= boundary < needed - 1:
            raise ValueError(
                f"{name}: row {index}: a prompt of {len(ids)} tokens with a rationale of "
                f"{max_completion_length} and its answer goes past the {boundary} up to which the "
                "model has its short rotary frequencies, and a rationale sampled with these would "
                "be scored with the long ones; lower max_completion_length or drop the row; "
                f"{_beginning(prompt)}"
            )
    return longest


def check_rationales(dataset: Dataset, name: str, model: PreTrainedModel, join: AnswerJoin) -> None:
    """Reject a dataset with a written rationale that is too long for the model.

    Args:
        dataset: with the columns prompt, rationale and answer, as `check_dataset` takes it.
        name: what the messages call it.
        model: its `max_position_embeddings` is the limit.
        join: makes the rationale's and the answer's tokens.

    Raises:
        ValueError: such a row; names it and how its prompt begins.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return
    for index, row in enumerate(dataset):
        prompt_ids = encode_prompt(join.tokenizer, row["prompt"])
        needed = len(join.written(prompt_ids, row["rationale"], row["answer"]).input_ids)
        if needed > limit:
            raise ValueError(
                f"{name}: row {index}: prompt, rationale and answer take {needed} positions, but "
                f"the model has {limit}; drop the row; {_beginning(row['prompt'])}"
            )


def _beginning(prompt: Prompt) -> str:
    """For messages: in a split that a hash cut, a row's index is not its line in the file."""
    text = " ".join(prompt_text(prompt).split())
    return f"its prompt begins {text[:_SHOWN]!r}"
