"""Sequences of token ids: prompts, rationales and the answers joined to them."""

from latro.rollout.sequences import (
    AnswerJoin,
    Rollout,
    RolloutEngine,
    Sample,
    decode,
    eos_token_ids,
)

__all__ = ["AnswerJoin", "Rollout", "RolloutEngine", "Sample", "decode", "eos_token_ids"]
