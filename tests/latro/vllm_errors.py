"""How far an engine's log-probs are from the truth, and how far they may be."""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedModel

from latro.rollout.sequences import Sample


def log_probs(
    model: PreTrainedModel, prompt: list[int], ids: list[int], temperature: float
) -> torch.Tensor:
    """Return the log-probs of `ids` after `prompt`, from all logits, in the model's dtype."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    logp = torch.log_softmax(logits / temperature, dim=-1)
    return logp.gather(1, torch.tensor(ids)[:, None])[:, 0].double()


def errors(
    model: PreTrainedModel, prompts: list[list[int]], groups: list[list[Sample]], temperature: float
) -> tuple[float, float]:
    """Return the engine's largest error against fp64, and the largest that is allowed."""
    exact = copy.deepcopy(model).double()
    engine = unfused = 0.0
    for prompt, group in zip(prompts, groups, strict=True):
        for sample in group:
            truth = log_probs(exact, prompt, sample.ids, temperature)
            plain = log_probs(model, prompt, sample.ids, temperature)
            engine = max(engine, (torch.tensor(sample.logp) - truth).abs().max().item())
            unfused = max(unfused, (plain - truth).abs().max().item())
    return engine, 2 * unfused + 1e-5
