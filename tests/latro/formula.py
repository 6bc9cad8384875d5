"""The loss of an update as the paper writes it, through whole logits."""

from __future__ import annotations

import torch


def sequence_logps(model, rollout):
    """Return log π of each rationale token, of each answer token, and of all possible tokens."""
    logp = model(input_ids=torch.tensor([rollout.input_ids])).logits[0].log_softmax(-1)
    first = len(rollout.prompt_ids) - 1
    z = [logp[first + i, t] for i, t in enumerate(rollout.sampled_ids)]
    y = [logp[first + rollout.answer_start + j, t] for j, t in enumerate(rollout.answer_ids)]
    return torch.stack(z), torch.stack(y), logp[first : first + len(rollout.sampled_ids)]


def rewarded(rollout, tokens):
    """Return the indices of the answer tokens whose log-probs are the reward."""
    own = rollout.own_rows
    return list({"all": range(len(rollout.answer_ids)), "answer": own}.get(tokens, range(own.stop)))


def formula_loss(
    model, ref_model, groups, beta, answer_weight, kl, unfinished, reward_tokens="all"
):
    """Return the method's loss as the paper writes it, by autograd through whole logits.

    −1/(NK) Σ [A_k log π(z_k|x) + λ log π(y|x⊕z_k)], with the KL in the reward, added as k3, or both
    where it is exact.
    """
    loss = 0.0
    count = sum(map(len, groups))
    for group in groups:
        z_logp, y_logp, divergence, earned = [], [], [], []
        for rollout in group:
            z, y, log_p = sequence_logps(model, rollout)
            with torch.no_grad():
                ref, _, log_q = sequence_logps(ref_model, rollout)
            z_logp.append(z.sum())
            y_logp.append(y.sum())
            earned.append(y[rewarded(rollout, reward_tokens)].sum())
            k3 = torch.exp(ref - z) - (ref - z) - 1
            rows = {"reward": z - ref, "k3": k3, "exact": (log_p.exp() * (log_p - log_q)).sum(-1)}
            divergence.append(rows[kl].sum())
        weight = 0 if kl == "k3" else beta
        rewards = [(y - weight * d).item() for y, d in zip(earned, divergence, strict=True)]
        members = list(range(len(group)))
        if unfinished == "floor":
            floor = min(rewards)
            rewards = [r if g.finished else floor for r, g in zip(rewards, group, strict=True)]
        else:
            members = [k for k in members if group[k].finished]
        for k in members:
            others = [rewards[j] for j in members if j != k]
            advantage = rewards[k] - sum(others) / len(others) if others else 0.0
            loss = loss - advantage * z_logp[k] - answer_weight * y_logp[k]
            if kl != "reward":
                loss = loss + beta * divergence[k]
    return loss / count
