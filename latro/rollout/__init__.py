"""Sequences of token ids: prompts, rationales and the answers joined to them."""

from latro.rollout.answer_join import AnswerJoin
from latro.rollout.sequences import Rollout, RolloutEngine, Sample, decode, eos_token_ids

__all__ = ["AnswerJoin", "Rollout", "RolloutEngine", "Sample", "decode", "eos_token_ids"]
