"""Render messages with a tokenizer's chat template, and find the token that ends a turn in it.

Rendering happens in a process of its own (`latro.rollout.template_worker`), which this process
starts once and then keeps asking: so a template that never ends, or takes all memory, is only an
error.
"""

from __future__ import annotations

import functools
import os
import re
import signal
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from latro.rollout.template_worker import SECONDS
from latro.worker import Worker, WorkerEndedError

_WORKER = Path(__file__).with_name("template_worker.py")
# Words that no template has; of letters only, so that no template escapes them.
ASKED, SAID = "Vrzyqka", "Wqhxolto"


class TemplateRefusalError(ValueError):
    """A chat template raised an error on the messages."""


def tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the name of a tokenizer for error messages."""
    return f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__}"


def template_of(tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]) -> str:
    """Return the template that is rendered: some tokenizers have one of their own for tools."""
    return tokenizer.get_chat_template(tools=template_kwargs.get("tools"))


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool,
    template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """Return what `tokenizer.apply_chat_template(messages, tokenize=False)` does, within limits.

    `template_kwargs` are arguments that the template itself reads.

    Raises:
        TemplateRefusalError: the template raises an error on the messages.
        ValueError: it exceeds the limits on time, memory or characters of `template_worker`.
    """
    (text,) = render_each(
        tokenizer,
        [messages],
        add_generation_prompt=add_generation_prompt,
        template_kwargs=template_kwargs,
    )
    return text


def render_each(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    *,
    add_generation_prompt: bool,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[str]:
    """Return what `render` does for each of several conversations, by one request.

    The limits are those of one rendering, and an error is of any of them.
    """
    given = template_kwargs or {}
    request = {
        "conversations": [[dict(message) for message in messages] for messages in conversations],
        "chat_template": template_of(tokenizer, given),
        "add_generation_prompt": add_generation_prompt,
        **tokenizer.special_tokens_map,
        **given,
    }
    return _reply(tokenizer, request)["texts"]


def arguments_of(
    tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]
) -> list[str]:
    """Return the names that the template reads before it sets them: what it may be given.

    Raises:
        ValueError: the template cannot be read, or not within the limits of `template_worker`.
    """
    template = template_of(tokenizer, template_kwargs)
    return _reply(tokenizer, {"arguments_of": template})["arguments"]


def leaves_out_the_user(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the chat template renders the same text whatever a user says.

    For a template that refuses a single user message this is not known, and the result is False.
    """
    try:
        one, other = (
            render(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True)
            for text in (ASKED, SAID)
        )
    except TemplateRefusalError:
        return False
    return one == other


def end_of_turn(tokenizer: PreTrainedTokenizerBase, known_ends: Collection[int]) -> int | None:
    r"""Return the token that ends an assistant's turn in the chat template's frame.

    It is the first special token after the content: `<|im_end|>` of "<|im_end|>\n". A token that
    closes a frame ("</answer>") or begins a text does not end a turn. Where the template puts
    nothing after a conversation's last turn, one of `known_ends` may separate it from a next one.

    Args:
        tokenizer: a tokenizer, with or without a chat template.
        known_ends: the tokens that are known to end a completion.

    Returns:
        The token's id; None where there is no template, the template cannot render an assistant's
        turn, or there is no such token.

    Raises:
        ValueError: the template exceeds the limits of `render`.
    """
    if not tokenizer.chat_template:
        return None
    conversation = [
        {"role": "user", "content": ASKED},
        {"role": "assistant", "content": SAID},
        {"role": "user", "content": ASKED},
    ]
    for last in (2, 3):
        try:
            text = render(tokenizer, conversation[:last], add_generation_prompt=False)
        except TemplateRefusalError:
            continue
        _, said, behind = text.rpartition(SAID)
        tail = behind.partition(ASKED)[0] if said else ""
        marks = [i for i in _marks(tokenizer, tail, known_ends) if last == 2 or i in known_ends]
        if marks:
            return marks[0]
    return None


def _marks(tokenizer: PreTrainedTokenizerBase, text: str, known_ends: Collection[int]) -> list[int]:
    """Return the tokens of `text` that are not words and may end a turn."""
    added = tokenizer.added_tokens_decoder
    return [
        i
        for i in tokenizer.encode(text, add_special_tokens=False)
        if i in known_ends
        or (
            i in added
            and i != tokenizer.bos_token_id
            and not re.fullmatch(r"\s*(</.*>)?\s*", added[i].content)
        )
    ]


def _line(message: str) -> str:
    return " ".join(message.split())


def _reply(tokenizer: PreTrainedTokenizerBase, request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the reply of the process that renders; raise where it is `refusal` or `excess`."""
    reply = _ask(request)
    template = f"the chat template of {tokenizer_name(tokenizer)}"
    if "refusal" in reply:
        raise TemplateRefusalError(f"{template} refuses the messages: {_line(reply['refusal'])}")
    if "excess" in reply:
        raise ValueError(f"{template} {_line(reply['excess'])}")
    return reply


def _ask(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the reply of the process that renders, which may be gone."""
    try:
        reply = _worker(os.getpid()).ask(request)
    except WorkerEndedError as ended:
        told = f"ends the process that renders it: {ended}"
        if ended.code == -signal.SIGXCPU:
            told = f"does not end within {SECONDS} seconds"
        reply = {"excess": told}
    if "excess" in reply:
        # The worker is gone or about to be; the next request starts another.
        _worker.cache_clear()
    return reply


@functools.cache
def _worker(pid: int) -> Worker:
    """Return the worker of this process, whose id is `pid`: a fork starts one of its own."""
    return Worker(_WORKER)
