"""Importance of sampled tokens where the engine that drew them is not the policy to the last bit.

The gradient wants rationales z of the policy π; a rollout engine has kernels and perhaps a
precision of its own, and so draws them from some μ beside it. Token by token they differ by

    w_t = π(z_t | x, z_<t) / μ(z_t | x, z_<t)

and its truncated form min(w_t, C) in the coefficient of token t takes most of the bias out while
no token can weigh more than C (Ionides 2008, "Truncated Importance Sampling"; per token, for a
training and a sampling engine that disagree: Yao et al. 2025, "Your Efficient RL Framework Secretly
Brings You Off-Policy RL Training", https://fengyao.notion.site/off-policy-rl).
"""

from __future__ import annotations

import torch
from torch import Tensor


def importance(logp: Tensor, engine_logp: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
    """Return each head row's ratio, and the weight that multiplies its coefficient.

        ratio = exp(logp − engine_logp)
        weight = min(ratio, cap)

    Args:
        logp: fp32 [N], log π of each row's token, in nats; used without gradient.
        engine_logp: fp32 [N], log μ of tokens that the engine drew; NaN at answers, which it did
            not draw.
        cap: C; None: every weight is 1.

    Returns:
        Ratios, fp32 [N], NaN at answers; weights, fp32 [N], 1 at answers.
    """
    ratio = torch.exp(logp.detach() - engine_logp)
    one = torch.ones_like(ratio)
    if cap is None:
        return ratio, one
    return ratio, torch.where(engine_logp.isnan(), one, ratio.clamp(max=cap))
