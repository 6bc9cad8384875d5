"""group_advantage in C++ and in CUDA C++."""

from __future__ import annotations

import torch
from torch import Tensor

from latro_kernels import native
from latro_kernels.group_advantage.layout import GroupLayout, check_offsets


def forward(
    outputs: tuple[Tensor, ...],
    rows: tuple[Tensor, Tensor | None, Tensor | None],
    layout: GroupLayout,
    *,
    beta: float,
    answer_weight: float,
    k3: bool,
    exclude_unfinished: bool,
) -> None:
    """Fill `outputs`, the fields of `GroupAdvantage` in their order, but the last.

    Args:
        outputs: fp32 [S], the last [N].
        rows: logp, ref_logp and row_kl, fp32 [N]; of the latter two at least one is None.
        layout: the segments and groups of the N rows.
        beta: as in `group_advantage`.
        answer_weight: as in `group_advantage`.
        k3: whether kl is "k3", which is no part of the reward.
        exclude_unfinished: whether unfinished is "exclude".
    """
    logp, S, K = rows[0], layout.num_sequences, layout.num_generations
    tensors = (*rows, layout.offsets, layout.finished, *outputs)
    scale = 1 / layout.num_averaged
    settings = (S // K, K, scale, beta, answer_weight, k3, exclude_unfinished)
    if logp.device.type == "cpu":
        # Free on this device, and a wrong offset would have the kernel read outside of logp.
        check_offsets(layout.offsets, logp.numel())
        rewards = torch.empty(S, dtype=torch.float64)
        threads = torch.get_num_threads()
        native.call("latro_cpu_group_advantage_forward", *tensors, rewards, *settings, threads)
    else:
        N, sizes = logp.numel(), native.constants()
        tiles = N // sizes["LATRO_GROUP_TILE_ROWS"] + 1
        words = S + tiles * sizes["LATRO_GROUP_TILE_WORDS"]
        scratch = torch.empty(words, dtype=torch.float64, device=logp.device)
        inputs = (*tensors, scratch, N, *settings)
        with torch.cuda.device(logp.device):
            stream = torch.cuda.current_stream().cuda_stream
            native.call("latro_cuda_group_advantage_forward", *inputs, stream)
