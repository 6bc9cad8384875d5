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
    kl: str,
    unfinished: str,
) -> None:
    """Fill `outputs`, the fields of `GroupAdvantage` in their order, but the last.

    `rows` are logp, ref_logp and row_kl, of which one of the latter two is None, or both. The other
    arguments are those of `group_advantage`.
    """
    logp, S, K = rows[0], layout.num_sequences, layout.num_generations
    tensors = (*rows, layout.offsets, layout.finished, *outputs)
    scale = 1 / layout.num_averaged
    flags = (kl == "k3", unfinished == "exclude")
    settings = (S // K, K, scale, beta, answer_weight, *flags)
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
