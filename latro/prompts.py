"""Prompts as token ids, checked before anything is trained on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from latro.rollout import AnswerJoin, Sample

# A text, or a conversation: {"role", "content"} messages.
Prompt = str | Sequence[Mapping[str, str]]


def prompt_text(prompt: Prompt) -> str:
    """A prompt as one string, to show, to compare and to look up by; a model reads another form.

    A conversation of one message of the user is the string that the message holds.
    """
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt: in the chat template's frame where the tokenizer has one.

    A chat template writes its own beginning-of-sequence token, so none is added there; without a
    template the tokenizer adds what it always adds, less an end-of-sequence token at the end.
    """
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        return list(tokenizer.encode(text, add_special_tokens=False))
    ids = list(tokenizer.encode(prompt))
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def check_dataset(
    dataset: Dataset,
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    join: AnswerJoin,
    max_completion_length: int,
) -> None:
    """Reject a dataset that some row of would fail in the middle of a run.

    Args:
        dataset: with the columns prompt and answer.
        name: what the messages call it.
        model: its `max_position_embeddings` is the limit.
        tokenizer: the model's.
        join: makes the answer's tokens.
        max_completion_length: the longest rationale, in tokens.

    Raises:
        ValueError: a missing column, no rows, an empty prompt or answer, or a row that does not
            fit the model with a rationale of full length; names the row.
    """
    missing = {"prompt", "answer"} - set(dataset.column_names)
    if missing:
        raise ValueError(
            f"{name}: expected the columns prompt and answer, got {dataset.column_names}"
        )
    if len(dataset) == 0:
        raise ValueError(f"{name}: expected at least one row, got none")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for index, (prompt, answer) in enumerate(
        zip(dataset["prompt"], dataset["answer"], strict=True)
    ):
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError(f"{name}: row {index}: expected a non-empty answer, got {answer!r}")
        ids = encode_prompt(tokenizer, prompt)
        if not ids:
            raise ValueError(f"{name}: row {index}: the prompt has no tokens: {prompt!r}")
        needed = len(ids) + max_completion_length + len(join(ids, Sample([]), answer).answer_ids)
        if limit is not None and needed > limit:
            raise ValueError(
                f"{name}: row {index}: a prompt of {len(ids)} tokens with a rationale of "
                f"{max_completion_length} and its answer takes {needed} positions, but the model "
                f"has {limit}; lower max_completion_length or drop the row"
            )
