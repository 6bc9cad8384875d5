"""The objectives' formulas, written with loops, for the tests of coefficients and of updates."""

from __future__ import annotations

import math
import statistics

import torch
from torch import Tensor

from latro.objectives import ObjectiveSettings, Rows


def surrogate(name: str, rows: Rows, settings: ObjectiveSettings) -> Tensor:
    """Return the loss whose autograd is the published estimator, with A held constant."""
    offsets, K = rows.layout.offsets.tolist(), rows.layout.num_generations
    finished = rows.layout.finished.tolist()
    lam, beta, kl = settings.answer_weight, settings.beta, settings.kl
    loss = rows.logp.new_zeros(())
    for first in range(0, len(finished), K):
        z, y, rewarded, p, divergence = [], [], [], [], []
        for s in range(first, first + K):
            rationale = slice(offsets[2 * s], offsets[2 * s + 1])
            answer = slice(offsets[2 * s + 1], offsets[2 * s + 2])
            z.append(rows.logp[rationale].sum())
            y.append(rows.logp[answer].sum())
            rewarded.append(y[-1])
            if rows.unrewarded is not None:
                rewarded[-1] = rows.logp[answer][~rows.unrewarded[answer]].sum()
            own = rows.logp[answer][rows.own_answer[answer]]
            p.append(own.detach().exp().mean().item())
            if kl == "exact":
                divergence.append(rows.row_kl[rationale].sum())
            else:
                d = rows.ref_logp[rationale] - rows.logp[rationale]
                divergence.append((-d if kl == "reward" else d.exp() - d - 1).sum())
        start, end = rows.plain_offsets[first // K :][:2].tolist()
        p_0 = rows.plain_logp[start:end].exp().mean().item()

        penalty = [0.0 if kl == "k3" else -beta * d.item() for d in divergence]
        reward = {
            "latro": [ell.item() + less for ell, less in zip(rewarded, penalty, strict=True)],
            "verifree": [ell.exp().item() for ell in y],
            "jepo": [ell.item() for ell in y],
            "rlpr": [min(1.0, max(0.0, p_k - p_0)) for p_k in p],
            "sft": [0.0] * K,
        }[name]
        if name == "latro":
            penalty = [0.0] * K
        members = range(K)
        if settings.unfinished == "floor":
            worst = min(reward), min(penalty)
            for k in range(K):
                if not finished[first + k]:
                    reward[k], penalty[k] = worst
        else:
            members = [k for k in members if finished[first + k]]
        if name == "rlpr":
            spread = statistics.stdev(reward[k] for k in members) if len(members) > 1 else 0.0
            if spread <= settings.rlpr_min_std:
                continue

        for k in members:
            others = [j for j in members if j != k]
            advantage = 0.0
            if others:
                advantage = reward[k] - statistics.fmean(reward[j] for j in others)
                if name == "jepo":
                    mean = log_mean_exp([reward[j] for j in members])
                    advantage = len(members) * (mean - log_mean_exp([reward[j] for j in others]))
                if name == "rlpr":
                    mean = statistics.fmean(reward[j] for j in members)
                    advantage = (reward[k] - mean) / spread
                advantage += penalty[k] - statistics.fmean(penalty[j] for j in others)
            loss = loss - advantage * z[k]
            if name in ("latro", "sft"):
                loss = loss - lam * y[k]
            if name == "verifree":
                loss = loss - lam * y[k].exp()
            if kl != "reward":
                loss = loss + beta * divergence[k]
        if name == "jepo" and members:
            logs = torch.stack([y[k] for k in members])
            loss = loss - lam * len(members) * (logs.logsumexp(0) - math.log(len(members)))
    return loss / (rows.layout.num_groups * K)


def log_mean_exp(logs: list[float]) -> float:
    peak = max(logs)
    return peak + math.log(statistics.fmean(math.exp(x - peak) for x in logs))
