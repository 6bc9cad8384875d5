"""Prompts, and their token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from latro.rollout.chat_template import tokenizer_name
from latro.rollout.frame import Frame

# A text, or a conversation: {"role", "content"} messages.
Prompt = str | Sequence[Mapping[str, str]]


def is_prompt(prompt: object) -> bool:
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
    return encode_prompts(tokenizer, [prompt], frame)[0]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], frame: Frame | None = None
) -> list[list[int]]:
    """Return what `encode_prompt` does for each of several prompts, in less time.

    Raises:
        ValueError: `encode_prompt` raises it for one of them.
    """
    frame = frame or Frame(tokenizer)
    return (_framed if tokenizer.chat_template else _unframed)(prompts, frame)


def _framed(prompts: Sequence[Prompt], frame: Frame) -> list[list[int]]:
    """Return the token ids of prompts in a chat template's frame."""
    encoder = frame.encoder
    conversations = []
    special = []
    for prompt in prompts:
        messages = frame.messages(prompt)
        if messages[-1]["role"] == "assistant":
            # The template would end that turn, and begin another of the assistant behind it.
            raise ValueError("expected the last message to be the user's, got the assistant's")
        special.append(any(encoder.spells_special(message["content"]) for message in messages))
        if special[-1]:
            messages = [{**m, "content": encoder.quoted(m["content"])} for m in messages]
        conversations.append(messages)
    texts = list(zip(frame.rendered_each(conversations), special, strict=True))
    others = iter(encoder.each([t for t, s in texts if not s], add_special_tokens=False))
    return [encoder.unquoted(text) if s else next(others) for text, s in texts]


def _unframed(prompts: Sequence[Prompt], frame: Frame) -> list[list[int]]:
    """Return the token ids of prompts as they are, for a tokenizer without a chat template."""
    tokenizer, encoder = frame.tokenizer, frame.encoder
    texts = [_alone(prompt, tokenizer) for prompt in prompts]
    special = [encoder.spells_special(text) for text in texts]
    pairs = list(zip(texts, special, strict=True))
    others = iter(encoder.each([t for t, s in pairs if not s], add_special_tokens=True))
    encoded = []
    for text, spells in pairs:
        ids = encoder(text, add_special_tokens=True) if spells else next(others)
        opening = tokenizer.bos_token
        if opening and text.startswith(opening) and ids[:1] == [tokenizer.bos_token_id]:
            ids = encoder(text.removeprefix(opening), add_special_tokens=True)
        if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
            ids.pop()
        encoded.append(ids)
    return encoded


def _alone(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of a prompt for a tokenizer without a chat template."""
    if not isinstance(prompt, str) and [message["role"] for message in prompt] != ["user"]:
        raise ValueError(
            f"{tokenizer_name(tokenizer)} has no chat template: expected a string, or one message "
            f"of the user, as the prompt; got {len(prompt)} messages ending in "
            f"{prompt[-1]['role']!r}"
        )
    return prompt_text(prompt)
