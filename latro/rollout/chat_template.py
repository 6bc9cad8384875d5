"""What a tokenizer's chat template makes of messages, and what it puts behind an assistant's turn.

Rendering happens in a process of its own (`latro.rollout.template_worker`), which this process
starts once and asks from then on: a template that never ends, or takes all memory, is an error and
no more.
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
# Words of no template; letters alone, so that nothing is escaped.
_ASKED, _SAID = "Vrzyqka", "Wqhxolto"


class TemplateRefusalError(ValueError):
    """A chat template raised an error on the messages."""


def tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what messages call a tokenizer."""
    return f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__}"


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool,
) -> str:
    """Return what `tokenizer.apply_chat_template(messages, tokenize=False)` does, within limits.

    Raises:
        TemplateRefusalError: the template raises an error on the messages.
        ValueError: it takes more time, memory or characters than it may; `template_worker` has the
            limits.
    """
    request = {
        "conversations": [[dict(message) for message in messages]],
        "chat_template": tokenizer.get_chat_template(),
        "add_generation_prompt": add_generation_prompt,
        **tokenizer.special_tokens_map,
    }
    reply = _ask(request)
    if "text" in reply:
        return reply["text"]
    template = f"the chat template of {tokenizer_name(tokenizer)}"
    if "refusal" in reply:
        raise TemplateRefusalError(f"{template} refuses the messages: {_line(reply['refusal'])}")
    raise ValueError(f"{template} {_line(reply['excess'])}")


def leaves_out_the_user(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the chat template renders whatever a user says as the same.

    A template that refuses a single message of a user is not known to.
    """
    try:
        one, other = (
            render(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True)
            for text in (_ASKED, _SAID)
        )
    except TemplateRefusalError:
        return False
    return one == other


def end_of_turn(tokenizer: PreTrainedTokenizerBase, known_ends: Collection[int]) -> int | None:
    """Return the token that ends an assistant's turn in the chat template's frame.

    That is the first special token behind the content: `<|im_end|>` of "<|im_end|>\\n". A token
    that closes a frame ("</answer>") or begins a text ends no turn. Where a conversation's last
    turn ends with nothing, one of `known_ends` may stand between it and the next.

    Args:
        tokenizer: perhaps with a chat template.
        known_ends: the tokens that are known to end a completion.

    Returns:
        Its id. None: there is no template, none that renders an assistant's turn, or no such token.

    Raises:
        ValueError: the template takes too much.
    """
    if not tokenizer.chat_template:
        return None
    conversation = [
        {"role": "user", "content": _ASKED},
        {"role": "assistant", "content": _SAID},
        {"role": "user", "content": _ASKED},
    ]
    for last in (2, 3):
        try:
            text = render(tokenizer, conversation[:last], add_generation_prompt=False)
        except TemplateRefusalError:
            continue
        _, said, behind = text.rpartition(_SAID)
        tail = behind.partition(_ASKED)[0] if said else ""
        marks = [i for i in _marks(tokenizer, tail, known_ends) if last == 2 or i in known_ends]
        if marks:
            return marks[0]
    return None


def _marks(tokenizer: PreTrainedTokenizerBase, text: str, known_ends: Collection[int]) -> list[int]:
    """The tokens of `text` that are no words and may end a turn."""
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


def _ask(request: Mapping[str, Any]) -> dict[str, str]:
    """Return the reply of the process that renders: `text`, `refusal` or `excess`."""
    try:
        reply = _worker(os.getpid()).ask(request)
    except WorkerEndedError as ended:
        told = f"ends the process that renders it: {ended}"
        if ended.code == -signal.SIGXCPU:
            told = f"does not end within {SECONDS} seconds"
        reply = {"excess": told}
    if "excess" in reply:
        # The process is gone, or about to be.
        _worker.cache_clear()
    return reply


@functools.cache
def _worker(pid: int) -> Worker:
    """Return the worker of the process `pid`, which is this one."""
    return Worker(_WORKER)
