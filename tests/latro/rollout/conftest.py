"""Tests of tokenisation take the tokenizer of a real model too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scripts.make_tiny_model import make_model, make_tokenizer
from tests.latro.conftest import TEXTS
from tests.latro.smollm2 import smollm2_tokenizer


@pytest.fixture(scope="session", params=["tiny", "smollm2"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    """Return a tokenizer without chat template; tests that need one write their own."""
    if request.param == "tiny":
        return make_tokenizer(TEXTS, vocab_size=400)
    tokenizer = smollm2_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


@pytest.fixture
def tiny(tokenizer: PreTrainedTokenizerBase) -> Callable[..., PreTrainedModel]:
    """Return what makes models for this tokenizer; the session's may be another's already."""

    def build(architecture: str = "llama", **options: Any) -> PreTrainedModel:
        return make_model(architecture, tokenizer, **options)

    return build


@pytest.fixture
def with_bos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a tokenizer that begins every text with a special token, as Llama's does."""
    made = copy.deepcopy(tokenizer)
    made.add_special_tokens({"bos_token": "<s>"})
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.bos_token_id)]
    )
    assert made.encode("pens")[0] == made.bos_token_id
    return made
