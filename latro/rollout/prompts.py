"""Prompts as token ids, checked before anything is trained on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from latro.rollout.answer_join import AnswerJoin
from latro.rollout.answer_template import template_pattern
from latro.rollout.chat_template import leaves_out_the_user, tokenizer_name
from latro.rollout.frame import Frame
from latro.rollout.long_rope import long_rope_boundary
from latro.rollout.sequences import Sample

# A text, or a conversation: {"role", "content"} messages.
Prompt = str | Sequence[Mapping[str, str]]

_SHOWN = 60  # characters of a prompt in a message


def prompt_text(prompt: Prompt) -> str:
    """Return a prompt as one string to show, compare and look up by; models read another form.

    A conversation of a single user message is the string in that message.
    """
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, frame: Frame | None = None
) -> list[int]:
    """Return the token ids of a prompt, in the frame of the tokenizer's chat template if any.

    A special token that is spelled in a prompt is read as text; only the frame has special tokens.

    With a chat template a string is one user message. The template is applied once, and it writes
    its own beginning-of-sequence token, so the tokenizer adds none. The prompt of a model that
    thinks ends where its thoughts begin (`latro.rollout.frame`). Without a template a string, or
    a single user message, is read as it is: the tokenizer adds its usual special tokens, except an
    end-of-sequence token at the end. A string that begins with the spelling of the
    beginning-of-sequence token gets that token once.

    Args:
        tokenizer: any tokenizer.
        prompt: a string, or messages.
        frame: the frame of this tokenizer, to share between prompts; None: one without a system
            prompt or other arguments.

    Raises:
        ValueError: the template refuses the messages or exceeds its limits, or does not fit the
            frame (`latro.rollout.frame`); the messages end with one of the assistant; or there is
            no template and the messages are other than a single user message.
    """
    frame = frame or Frame(tokenizer)
    encoder = frame.encoder
    if tokenizer.chat_template:
        messages = frame.messages(prompt)
        if messages[-1]["role"] == "assistant":
            # The template would end that turn, and begin another of the assistant behind it.
            raise ValueError("expected the last message to be the user's, got the assistant's")
        if any(encoder.spells_special(message["content"]) for message in messages):
            quoted = [{**m, "content": encoder.quoted(m["content"])} for m in messages]
            return encoder.unquoted(frame.rendered(quoted))
        text = frame.rendered(messages)
        return list(tokenizer.encode(text, add_special_tokens=False))
    if not isinstance(prompt, str) and [message["role"] for message in prompt] != ["user"]:
        raise ValueError(
            f"{tokenizer_name(tokenizer)} has no chat template: expected a string, or one message "
            f"of the user, as the prompt; got {len(prompt)} messages ending in "
            f"{prompt[-1]['role']!r}"
        )
    text = prompt_text(prompt)
    ids = encoder(text, add_special_tokens=True)
    opening = tokenizer.bos_token
    if opening and text.startswith(opening) and ids[:1] == [tokenizer.bos_token_id]:
        ids = encoder(text.removeprefix(opening), add_special_tokens=True)
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


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
) -> Longest:
    """Reject a dataset with a row that would fail in the middle of a run.

    Args:
        dataset: rows with the columns prompt and answer.
        name: the name of the dataset in messages.
        model: the model, whose `max_position_embeddings` is the limit.
        join: makes the prompt's and the answer's tokens.
        max_completion_length: the longest rationale, in tokens.

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
    rendered = _Rendered(join.frame, name)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for index, (prompt, answer) in enumerate(
        zip(dataset["prompt"], dataset["answer"], strict=True)
    ):
        if not _is_prompt(prompt):
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


def _is_prompt(prompt: object) -> bool:
    """Return whether this is a string, or a list of messages whose role and content are strings."""
    if isinstance(prompt, str):
        return True
    return (
        isinstance(prompt, Sequence)
        and len(prompt) > 0
        and all(
            isinstance(message, Mapping)
            and all(isinstance(message.get(key), str) for key in ("role", "content"))
            for message in prompt
        )
    )


class _Rendered:
    """Checks that a chat template renders different prompts of a dataset differently."""

    def __init__(self, frame: Frame, name: str) -> None:
        self.frame = frame
        self.name = name
        # Keyed by a hash, since the ids of all prompts together would take much memory.
        self.first: dict[int, tuple[int, Prompt]] = {}

    def add(self, index: int, prompt: Prompt, ids: list[int]) -> None:
        """Raise ValueError where an earlier prompt with other user messages has the same ids."""
        tokenizer = self.frame.tokenizer
        if not tokenizer.chat_template:
            return
        first, other = self.first.setdefault(hash(tuple(ids)), (index, prompt))
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


def check_rationales(dataset: Dataset, name: str, model: PreTrainedModel, join: AnswerJoin) -> None:
    """Reject a dataset with a written rationale that is too long for the model.

    Args:
        dataset: rows that passed `check_dataset`, with the columns prompt, rationale and answer.
        name: the name of the dataset in messages.
        model: the model, whose `max_position_embeddings` is the limit.
        join: makes the rationale's and the answer's tokens.

    Raises:
        ValueError: there is such a row; the message names it and shows the beginning of its prompt.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return
    for index, row in enumerate(dataset):
        prompt_ids = encode_prompt(join.tokenizer, row["prompt"], join.frame)
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
