r"""Save a tiny, randomly initialised causal language model with a BPE tokenizer of its own.

    python scripts/make_tiny_model.py --architecture mistral \
        --text ../shared/data/gsm8k/train.jsonl --output runs/tiny-mistral

For trying a pipeline on a real architecture in seconds: the model knows nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

ARCHITECTURES = ("llama", "mistral", "phi3", "qwen2", "qwen3", "gemma2", "cohere", "granite")
EOS = "<|endoftext|>"


def make_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> PreTrainedTokenizerBase:
    """Return a byte-level BPE tokenizer of `texts`; it has an end token and no padding token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


def make_model(
    architecture: str, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0, **options: Any
) -> PreTrainedModel:
    """Return a two-layer fp32 model of an architecture, with weights drawn from `seed`.

    `options` go to the architecture's config, over the small sizes chosen here.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"architecture: expected one of {', '.join(ARCHITECTURES)}, got {architecture!r}"
        )
    return two_layers(architecture, tokenizer, seed=seed, **({"head_dim": 8} | options))


def two_layers(
    architecture: str, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0, **options: Any
) -> PreTrainedModel:
    """Make one of any architecture: some want more options, and some take no `head_dim`."""
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
    }
    if architecture == "phi3":
        # Longer than this and Phi-3 wants a second set of rotary frequencies.
        sizes["original_max_position_embeddings"] = sizes["max_position_embeddings"]
    config = AutoConfig.for_model(architecture, **(sizes | options))
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="llama")
    parser.add_argument("--text", type=Path, required=True, help="what the tokenizer is trained on")
    parser.add_argument("--output", type=Path, required=True, help="the model directory to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.text.is_file():
        sys.exit(f"--text: no such file: {args.text}")
    if args.output.exists():
        sys.exit(f"--output: expected a folder that is not there, got {args.output}")
    tokenizer = make_tokenizer(args.text.read_text(encoding="utf-8").splitlines())
    model = make_model(args.architecture, tokenizer, seed=args.seed)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"{args.output}: {args.architecture}, {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
