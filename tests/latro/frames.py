"""Chat templates as those of real models are written, and tokenizers with them."""

from __future__ import annotations

import copy

from transformers import PreTrainedTokenizerBase

USER = {"role": "user", "content": "How many?"}
SYSTEM = {"role": "system", "content": "Be brief."}
REPLY = {"role": "assistant", "content": "Of what?"}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
    "{% else %}{{ eos_token }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GRANITE = (
    "{% for m in messages %}"
    "{{ '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}{% endfor %}"
)
# A frame for thoughts before the content, and another around the content.
THINKING = CHATML.replace(
    "+ m['content'] +",
    "+ ('<think>\n\n</think>\n\n<answer>' + m['content'].split('</think>')[-1].lstrip('\n')"
    " + '</answer>' if m['role'] == 'assistant' else m['content']) +",
)
PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
NOTHING = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
BETWEEN = (
    "{% for m in messages %}{{ m['content'] }}"
    "{% if not loop.last %}{{ '<s>' + eos_token }}{% endif %}{% endfor %}"
)
NO_LAST_ANSWER = (
    "{% if messages[-1]['role'] == 'assistant' %}{{ raise_exception('Not last') }}{% endif %}"
) + CHATML
NO_ANSWERS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 1 + 'x' }}{% endif %}"
    "{{ m['content'] }}<|im_end|>{% endfor %}"
)


def framed(
    tokenizer: PreTrainedTokenizerBase, template: str, *tokens: str
) -> PreTrainedTokenizerBase:
    """Return a copy of a tokenizer with a chat template and more special tokens."""
    made = copy.deepcopy(tokenizer)
    made.add_special_tokens({"bos_token": "<s>"})
    made.add_special_tokens({"additional_special_tokens": list(tokens)})
    made.chat_template = template
    return made
