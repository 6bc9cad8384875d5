"""What becomes of a tile of `linear_logprob`, in CUDA C++: `csrc/cuda/linear_logprob.cu`."""

from __future__ import annotations

import torch
from torch import Tensor

from latro_kernels import native
from latro_kernels.head import Head
from latro_kernels.linear_logprob.state import RowGrad, State
from latro_kernels.logit_tiles import Tile


def fold(head: Head, tile: Tile, products: Tensor, state: State) -> None:
    """Add a tile's products to the state of its rows, in place."""
    with torch.cuda.device(products.device):
        native.call(
            "latro_cuda_linear_logprob_fold",
            products,
            tile.bias,
            state.target,
            state.row_max,
            state.sum_exp,
            state.target_logit,
            state.weighted_sum,
            state.square_sum,
            state.logit_sum,
            *products.shape,
            tile.columns.start,
            head.softcap,
            head.temperature,
            torch.cuda.current_stream().cuda_stream,
        )


def grad(head: Head, tile: Tile, products: Tensor, grad: RowGrad, dz: Tensor) -> None:
    """Write dz of a tile, which may take the place of its products."""
    with torch.cuda.device(products.device):
        native.call(
            "latro_cuda_linear_logprob_grad",
            products,
            dz,
            native.dtype_code(dz.dtype),
            tile.bias,
            grad.target,
            grad.grad_logp,
            grad.grad_entropy,
            grad.logp,
            grad.offset,
            grad.grad_square,
            grad.row_max,
            grad.log_sum,
            *products.shape,
            tile.columns.start,
            head.softcap,
            head.temperature,
            torch.cuda.current_stream().cuda_stream,
        )
