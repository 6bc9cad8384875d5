"""`BranchScorer`: log-probs of continuations that share their prompts, as of each alone."""

from __future__ import annotations

import copy

import pytest
import torch

from latro.model.branches import BranchScorer
from latro.model.scoring import Scorer
from scripts.make_tiny_model import ARCHITECTURES

PROMPTS = [[5, 6, 7, 8], [9], [10, 11]]
BRANCHES = [[[1, 2, 3], [4], [], [1, 2, 3]], [[5, 6], [7, 8, 9, 10]], []]


def alone(model, temperature):
    """Return log-probs and entropies from the logits of each sequence by itself."""
    logps, entropies = [], []
    for prompt, group in zip(PROMPTS, BRANCHES, strict=True):
        for branch in group:
            logits = model(input_ids=torch.tensor([prompt + branch])).logits[
                0, len(prompt) - 1 : -1
            ]
            log_p = (logits / temperature).log_softmax(-1)
            logps.append(log_p.gather(1, torch.tensor(branch, dtype=torch.int64)[:, None])[:, 0])
            entropies.append(-(log_p.exp() * log_p).sum(-1))
    return torch.cat(logps), torch.cat(entropies)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_log_probs_and_gradients_are_those_of_each_sequence_alone(tiny, architecture):
    model = tiny(architecture)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    scorer = BranchScorer(model, temperature=0.7)
    results = {}
    for name, m, score in (
        ("ours", model, lambda: scorer(PROMPTS, BRANCHES)),
        ("plain", plain, lambda: alone(plain, 0.7)),
        ("truth", exact, lambda: alone(exact, 0.7)),
    ):
        logp, entropy = score()
        upstream = torch.randn(len(logp), generator=torch.Generator().manual_seed(1))
        # A bonus for entropy, which some losses have.
        (logp * upstream + 0.5 * entropy).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in m.parameters()])
        results[name] = [x.detach().double() for x in (logp, entropy, gradient)]
    for ours, plain, truth in zip(*results.values(), strict=True):
        scale = max(1, truth.abs().max())
        assert (ours - truth).abs().max() <= 2 * (plain - truth).abs().max() + 1e-5 * scale


def test_every_prompt_goes_through_the_trunk_once(tiny):
    model = tiny()
    scorer = BranchScorer(model)
    counts = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: counts.append(args[0].numel())
    )
    scorer(PROMPTS, BRANCHES)
    # No branch's last token is read, and no prompt without branches.
    assert counts == [(4 + 2 + 2) + (1 + 1 + 3)]


def test_another_model_of_the_architecture_is_scored_with_its_own_weights(tiny):
    model, another = tiny(seed=1), tiny(seed=2)
    scorer = BranchScorer(model)
    expected = BranchScorer(tiny(seed=2))(PROMPTS, BRANCHES)[0]
    assert torch.equal(scorer.of_another(another)(PROMPTS, BRANCHES)[0], expected)
    assert not torch.equal(scorer(PROMPTS, BRANCHES)[0], expected)


def test_branches_without_tokens_have_a_gradient_of_zero(tiny):
    model = tiny()
    logp, entropy = BranchScorer(model)([[1, 2]], [[[], []]])
    assert logp.shape == entropy.shape == (0,)
    logp.sum().backward()
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


def test_a_model_that_cannot_share_a_prefix_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(Scorer, "_why_not_packed", lambda self: "its layers carry a state")
    with pytest.raises(ValueError, match="got LlamaForCausalLM: its layers carry a state"):
        BranchScorer(tiny())


@pytest.mark.parametrize(
    ("prompts", "branches", "word"),
    [
        ([[1]], [], "branches: expected a group for each of 1 prompts, got 0"),
        ([[1], [2]], [[], []], "branches: expected at least one, got none"),
        ([[1], []], [[[1]], [[1]]], "prompts: expected at least one token in each, got none in 1"),
    ],
)
def test_bad_input_is_refused(tiny, prompts, branches, word):
    with pytest.raises(ValueError, match=word):
        BranchScorer(tiny())(prompts, branches)
