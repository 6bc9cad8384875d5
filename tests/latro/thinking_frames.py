"""Chat templates that are written as those of models that think, and tokenizers with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from tests.latro.frames import framed

# Thoughts are dropped from all turns but those behind the last question.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set content = m.content %}{% set thoughts = '' %}"
    "{% if m.role == 'assistant' and '</think>' in content %}"
    "{% set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thoughts) %}"
    "{{ '<think>\n' + thoughts + '\n</think>\n\n' }}{% endif %}"
    "{{ content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
QWEN3_THINKING = QWEN3.replace(
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}",
    "{{ '<think>\n' }}",
)
SMOLLM3 = (
    "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
    "{% set mode = '/think' if enable_thinking else '/no_think' %}{% set own = '' %}"
    "{% if messages[0].role == 'system' %}{% set own = messages[0].content %}"
    "{% if '/no_think' in own %}{% set mode = '/no_think' %}"
    "{% elif '/think' in own %}{% set mode = '/think' %}{% endif %}"
    "{% set own = own.replace('/no_think', '').replace('/think', '').rstrip() %}{% endif %}"
    "{{ '<|im_start|>system\n## Metadata\n\nReasoning Mode: ' + mode + '\n\n' }}"
    "{% if own %}{{ '## Custom Instructions\n\n' + own + '\n\n' }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% if mode != '/think' %}{{ '<think>\n\n</think>\n' }}{% endif %}"
    "{{ m.content.lstrip('\n') + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if mode != '/think' %}{{ '<think>\n\n</think>\n' }}{% endif %}{% endif %}"
)
DEEPSEEK_R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% else %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
GPT_OSS = (
    "{{ '<|start|>system<|message|>Reasoning: ' + (reasoning_effort or 'medium') + '\n\n'"
    " + '# Valid channels: analysis, commentary, final.<|end|>' }}"
    "{% for m in messages %}{% if m.role == 'system' %}"
    "{{ '<|start|>developer<|message|># Instructions\n\n' + m.content + '\n\n<|end|>' }}"
    "{% elif m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}"
    "{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A template, and what is expected of it."""

    template: str
    special: tuple[str, ...]
    """Special tokens beside the tokenizer's own."""
    end: str
    """The token that ends a turn."""
    prompt_end: str
    """How a prompt ends for a model that thinks."""
    closing: str = "</think>"
    behind: str = "\n\n"
    before: str = "\n"
    """What stands before `closing` where no white space does."""
    marks: tuple[str, ...] = ("<think>", "</think>")
    """Tokens that are not special."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def tokenizer(
        self, tokenizer: PreTrainedTokenizerBase, *, marks: bool = True
    ) -> PreTrainedTokenizerBase:
        """Return a copy of a tokenizer with this template; without `marks` they are plain text."""
        made = framed(tokenizer, self.template, *self.special)
        if marks:
            made.add_tokens(list(self.marks))
        return made


CHATML = ("<|im_start|>", "<|im_end|>")
OPENED = "<|im_start|>assistant\n<think>\n"
THINKING = {
    "Qwen3": Family(QWEN3, CHATML, "<|im_end|>", OPENED),
    "Qwen3, asked to think": Family(
        QWEN3, CHATML, "<|im_end|>", OPENED, kwargs={"enable_thinking": True}
    ),
    "Qwen3-Thinking": Family(QWEN3_THINKING, CHATML, "<|im_end|>", OPENED),
    "SmolLM3": Family(SMOLLM3, CHATML, "<|im_end|>", OPENED, behind="\n"),
    "DeepSeek-R1": Family(
        DEEPSEEK_R1,
        ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
        "<｜end▁of▁sentence｜>",
        "<｜Assistant｜><think>\n",
    ),
    "gpt-oss": Family(
        GPT_OSS,
        ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"),
        "<|return|>",
        "<|start|>assistant<|channel|>analysis<|message|>",
        closing="<|end|>",
        behind="<|start|>assistant<|channel|>final<|message|>",
        before="",
        marks=(),
        kwargs={"reasoning_effort": "low"},
    ),
}
