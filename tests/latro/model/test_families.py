"""Which families of models are packed: those of transformers, with two tiny layers each."""

from __future__ import annotations

import pytest

from latro.model.scoring import Scorer
from tests.latro.other_models import other_model

PACKED = [
    *("afmoe", "apertus", "arcee", "bamba", "bitnet", "codegen", "cohere", "cohere2"),
    *("deepseek_v2", "deepseek_v3", "ernie4_5", "exaone4", "falcon_h1", "gemma"),
    *("gemma2", "gemma3_text", "gemma4_text", "glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode"),
    *("gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe", "granitemoehybrid", "helium"),
    *("hunyuan_v1_dense", "jetmoe", "kimi_linear", "lfm2", "lfm2_moe", "llama", "llama4_text"),
    *("minimax_m2", "mistral", "mixtral", "nemotron", "nemotron_h", "olmo2", "olmo3"),
    *("olmo_hybrid", "olmoe", "opt", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3"),
    *("qwen3_moe", "qwen3_next", "qwen3_5_text", "recurrent_gemma", "seed_oss", "smollm3"),
    *("stablelm", "starcoder2", "zamba2"),
]
PADDED = [
    *("bloom", "falcon", "mpt", "xglm"),  # attention of their own
    *("deepseek_v32", "doge"),  # keys chosen in the mask
    *("minimax", "jamba", "mamba", "falcon_mamba", "xlstm"),  # a state that nobody can reset
]


@pytest.mark.parametrize("architecture", [*PACKED, *PADDED])
def test_a_family_is_packed_or_padded_as_the_docs_say(tokenizer, architecture):
    """A scorer compares hidden states of the two ways, and log-probs with the model's own."""
    scorer = Scorer(other_model(architecture, tokenizer))
    assert scorer.packed == (architecture in PACKED), scorer.why_not_packed
