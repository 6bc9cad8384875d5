"""What a tokenizer's chat template makes of messages, and what it puts behind an assistant's turn.

Rendering happens in a process of its own (`latro.rollout.template_worker`), which this process
starts once and asks from then on: a template that never ends, or takes all memory, is an error and
no more.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from latro.rollout.template_worker import SECONDS

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
        ValueError: it takes more time, memory or characters than it may
        (`latro.rollout.template_worker`
            has the limits).
    """
    request = {
        "conversations": [[dict(message) for message in messages]],
        "chat_template": tokenizer.get_chat_template(),
        "add_generation_prompt": add_generation_prompt,
        **tokenizer.special_tokens_map,
    }
    reply = _worker(os.getpid()).ask(request)
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


class _Worker:
    """The process that renders. One request is under way at a time."""

    def __init__(self) -> None:
        # It is read, and closed, when the process has ended. A pipe would fill up unread.
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            # Isolated: no file in this package's folder or the current one stands in for a module.
            [sys.executable, "-I", str(_WORKER), json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
            # A pool of threads for each core would take all of the address space that is allowed.
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            # A signal to the run's processes is the run's to handle.
            start_new_session=True,
        )
        self._lock = threading.Lock()
        atexit.register(self.close)

    def ask(self, request: Mapping[str, Any]) -> dict[str, str]:
        """Return the reply: `text`, `refusal` or `excess`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            try:
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
                line = self._process.stdout.readline()
            except BrokenPipeError:
                line = ""
            if not line:
                return {"excess": self._end()}
            reply = json.loads(line)
            if "excess" in reply:
                self._end()
            return reply

    def close(self) -> str:
        """End the process, which ends with its input; return what it wrote of errors."""
        atexit.unregister(self.close)
        self._process.communicate()
        with self._errors:
            self._errors.seek(0)
            return self._errors.read()

    def _end(self) -> str:
        """End the process, or what is left of it, and return what it ended of."""
        _worker.cache_clear()
        errors = self.close().splitlines()
        code = self._process.returncode
        if code == -signal.SIGXCPU:
            return f"does not end within {SECONDS} seconds"
        told = signal.Signals(-code).name if code < 0 else [str(code), *errors][-1]
        return f"ends the process that renders it: {told}"


@functools.cache
def _worker(pid: int) -> _Worker:
    """The worker of the process `pid`, which is this one: one forked from it needs its own."""
    return _Worker()
