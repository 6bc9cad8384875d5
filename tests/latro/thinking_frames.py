"""Chat templates that are written as those of models that think, and tokenizers with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
# A block on a line of its own, without lines in it; what opens the next turn ends one.
GLM = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% set off = enable_thinking is defined and not enable_thinking %}"
    "{{ '[gMASK]<sop>' }}{% for m in messages %}{{ '<|' + m.role + '|>\n' }}"
    "{% if m.role == 'assistant' %}"
    "{{ '<think>' + (m.reasoning_content or '' if loop.index0 > ns.last else '') + '</think>\n' }}"
    "{{ m.content | trim }}"
    "{% else %}{{ m.content + ('/nothink' if off and m.role == 'user' else '') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}"
    "{% if off %}{{ '\n<think></think>' }}{% endif %}{% endif %}"
)
# Every turn has a block, and the model opens its own.
KIMI = (
    "{% for m in messages %}{{ '<|im_' + m.role + '|>' + m.role + '<|im_middle|>' }}"
    "{% if m.role == 'assistant' %}{{ '<think>' }}"
    "{% if loop.last %}{{ m.reasoning_content }}{% endif %}{{ '</think>' }}{% endif %}"
    "{{ m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_assistant|>assistant<|im_middle|>' }}{% endif %}"
)
# The block is open from the beginning, and a line less is behind it than with Qwen's.
NEMOTRON = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{{ '<think>' }}{% if m.reasoning_content and loop.last %}"
    "{{ '\n' + m.reasoning_content + '\n</think>\n' }}{% else %}{{ '</think>' }}{% endif %}"
    "{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}"
    "{{ '\n' if enable_thinking | default(true) else '</think>' }}{% endif %}"
)
EXAONE_DEEP = (
    "{% for m in messages %}{{ '[|' + m.role + '|]' + m.content.split('</thought>')[-1] }}"
    "{% if m.role != 'user' %}{{ '[|endofturn|]' }}{% endif %}"
    "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n[|assistant|]<thought>\n' }}{% endif %}"
)
# Those of Magistral and Seed-OSS show no thoughts; here the generation prompt opens them.
MAGISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}"
    "{% elif m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% else %}{{ m.content + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[THINK]' }}{% endif %}"
)
SEED = (
    "{% for m in messages %}{{ '<seed:bos>' + m.role + '\n' }}"
    "{% if m.reasoning_content %}"
    "{{ '<seed:think>' + m.reasoning_content + '</seed:think>\n' }}{% endif %}"
    "{{ m.content + '<seed:eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<seed:bos>assistant\n<seed:think>' }}{% endif %}"
)
GEMMA_4 = (
    "{{ bos_token }}{% if enable_thinking %}{{ '<|turn>system\n<|think|><turn|>\n' }}{% endif %}"
    "{% for m in messages %}"
    "{{ '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{% if m.thinking and loop.last %}"
    "{{ '<|channel>thought\n' + m.thinking + '\n<channel|>' }}{% endif %}"
    "{{ m.content | trim + '<turn|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>model\n' }}"
    "{% if not enable_thinking %}{{ '<|channel>thought\n<channel|>' }}{% endif %}{% endif %}"
)
# As the smaller models have it, whose prompts end alike whether they are to think or not.
GEMMA_4_SMALL = GEMMA_4.replace(
    "{% if not enable_thinking %}{{ '<|channel>thought\n<channel|>' }}{% endif %}", ""
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
GEMMA_FAMILY = Family(
    GEMMA_4,
    ("<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>"),
    "<turn|>",
    "<|turn>model\n<|channel>thought\n",
    closing="<channel|>",
    behind="",
    marks=(),
    kwargs={"enable_thinking": True},
)
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
    "GLM": Family(
        GLM,
        ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>"),
        "<|user|>",
        "<|assistant|>\n<think>",
        behind="\n",
        before="",
    ),
    "Kimi": Family(
        KIMI,
        ("<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|im_end|>"),
        "<|im_end|>",
        "<|im_middle|><think>",
        behind="",
        before="",
    ),
    "Nemotron": Family(NEMOTRON, CHATML, "<|im_end|>", OPENED, behind="\n"),
    "EXAONE Deep": Family(
        EXAONE_DEEP,
        ("[|user|]", "[|assistant|]", "[|endofturn|]"),
        "[|endofturn|]",
        "\n[|assistant|]<thought>\n",
        closing="</thought>",
        marks=("<thought>", "</thought>"),
    ),
    "Magistral": Family(
        MAGISTRAL,
        ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[THINK]", "[/THINK]", "</s>"),
        "</s>",
        "[/INST][THINK]",
        closing="[/THINK]",
        behind="",
        before="",
        marks=(),
    ),
    "Seed-OSS": Family(
        SEED,
        ("<seed:bos>", "<seed:eos>", "<seed:think>", "</seed:think>"),
        "<seed:eos>",
        "assistant\n<seed:think>",
        closing="</seed:think>",
        behind="\n",
        before="",
        marks=(),
    ),
    "Gemma 4": GEMMA_FAMILY,
    "Gemma 4, small": replace(GEMMA_FAMILY, template=GEMMA_4_SMALL),
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
