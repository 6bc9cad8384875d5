"""`linear_logprob` in Triton without a tile of logits in memory: the kernels in their loops.

The forward is one launch over the whole vocabulary and one that merges. The backward makes dz of a
tile in one launch, from products that it makes again or that were kept, and leaves the rest to
`head_gradient`. With a frozen head the forward goes slice by slice, keeps a slice's products just
long enough to make exp(z − peak) of them, and multiplies that with the weight.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from latro_kernels.head import Head
from latro_kernels.head_gradient import (
    ActiveBlocks,
    Gradient,
    Tile,
    add_product,
    operand_dtype,
    slices,
    sweep,
)
from latro_kernels.linear_logprob.state import RowGrad, State, Wanted, filter_order, make_state
from latro_kernels.linear_logprob.triton import blocks
from latro_kernels.linear_logprob.triton.blocks import Config
from latro_kernels.linear_logprob.triton.fused_forward import forward_kernel, merge_kernel
from latro_kernels.linear_logprob.triton.fused_gradient import grad_kernel, rescale_kernel

# Of dz. The columns are the same for any N: a sum over them has the same parts. Many of both make
# few sums of dx and dw; dz then passes through memory, at a tenth of its products' time.
TILE_ROWS, TILE_COLUMNS = 8192, 8192
# With a frozen head products and exponentials stand side by side, in 6 bytes instead of 2.
FROZEN_TILE_ROWS = 2048
# Blocks of columns that a program folds, and row blocks that share a block of the weight.
TILES, GROUP = 4, 16
_MERGE_ROWS, _RESCALE_COLUMNS = 64, 1024


def forward(head: Head, wanted: Wanted, config: Config | None = None) -> State:
    """The sweep that makes log-probs; `config` as `blocks.config` says where it is None."""
    config = config or _config(head)
    state = empty_state(head, wanted)
    state.clear()
    N, V = len(head.hidden), len(head.weight)
    if N == 0:
        return state
    if state.pull is not None:
        for begin in range(0, N, FROZEN_TILE_ROWS):
            rows = slice(begin, min(begin + FROZEN_TILE_ROWS, N))
            block = replace(head, hidden=head.hidden[rows], target=head.target[rows])
            _forward_with_pull(block, state.rows(rows), state.pull[rows], config)
        return state
    ((columns, weight, bias),) = slices(head, V)
    tile = Tile(slice(0, N), columns, head.hidden.to(operand_dtype(head)), weight, bias)
    kept = state.kept.view(N, -1) if state.kept.numel() else None
    _fold(head, tile, state, kept, config)
    return state


def _forward_with_pull(head: Head, state: State, pull: Tensor, config: Config) -> None:
    (M, H), width = head.hidden.shape, min(TILE_COLUMNS, len(head.weight))
    x = head.hidden.to(operand_dtype(head))
    numbers = torch.empty(M, width, dtype=torch.float32, device=x.device)
    for columns, weight, bias in slices(head, width):
        tile = Tile(slice(0, M), columns, x, weight, bias)
        before = state.peak.clone()
        products = numbers[:, : len(weight)]
        _fold(head, tile, state, products, config)
        unit = RowGrad.of_exponentials(state.peak)
        e = _dz(head, tile, unit, products, None, 0.0, config).dz
        if columns.start > 0:
            moved = torch.where(state.peak == before, 1, torch.exp(before - state.peak))
            with torch.cuda.device_of(x):
                rescale_kernel[(M,)](pull, moved, H, BLOCK_H=_RESCALE_COLUMNS)
        add_product(pull, e, weight, first=columns.start == 0)


def empty_state(head: Head, wanted: Wanted) -> State:
    """Room for what `forward` makes."""
    return make_state(head, wanted, kept_grain=TILE_COLUMNS, peak_columns=_config(head).columns)


def backward(
    head: Head,
    grad: RowGrad,
    kept: Tensor,
    block_peak: Tensor | None,
    grad_filter: float,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, in fp32, weight and bias; None where `needs` says that nobody asks."""
    config, N = _config(head), len(head.hidden)
    rows = _rows_with_gradient(grad)
    if block_peak is not None:
        rows = filter_order(grad, block_peak, grad_filter, rows)
    whole = kept.view(N, -1) if kept.numel() else None

    def make(tile: Tile) -> Gradient:
        products = None
        if whole is not None and tile.columns.stop <= whole.shape[1]:
            products = whole[:, tile.columns]
        block = replace(head, target=head.target[tile.rows])
        own = grad.rows(tile.rows)
        return _dz(block, tile, own, products, block_peak, grad_filter, config)

    return sweep(head, needs, (TILE_ROWS, TILE_COLUMNS), make, rows)


def _rows_with_gradient(grad: RowGrad) -> Tensor | None:
    """Numbers of the rows that have an upstream gradient, or None for all.

    Their number has to be waited for, which a CUDA graph cannot: it takes all.
    """
    active = grad.active()
    if active.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    return None if bool(active.all()) else active.nonzero().flatten()


def _fold(head: Head, tile: Tile, state: State, kept: Tensor | None, config: Config) -> None:
    """Add a tile of all rows to `state`; `kept` receives products of its first columns."""
    (M, H), V = tile.hidden.shape, len(head.weight)
    begin, end = tile.columns.start, tile.columns.stop
    row_blocks = triton.cdiv(M, config.rows)
    splits = triton.cdiv(end - begin, TILES * config.columns)
    part_shape = (3 if state.weighted is None else 4, splits, M)
    parts = torch.empty(part_shape, dtype=torch.float32, device=tile.hidden.device)
    operands, by_descriptor = _operands(tile, config)
    kept_end = begin if kept is None else begin + kept.shape[1]
    with torch.cuda.device_of(tile.hidden):
        forward_kernel[(row_blocks * splits,)](
            *(*operands, tile.bias, head.target, parts, kept, state.block_peak),
            *(M, H, V, begin, end, *tile.hidden.stride(), *tile.weight.stride()),
            *(kept_end, 0 if kept is None else kept.stride(0), parts.stride(0)),
            *(row_blocks, splits, head.softcap, head.temperature),
            HAS_BIAS=tile.bias is not None,
            HAS_SOFTCAP=head.softcap > 0,
            WITH_ENTROPY=state.weighted is not None,
            WITH_KEPT=kept is not None,
            WITH_BLOCK_PEAK=state.block_peak is not None,
            TILES=TILES,
            **_constants(config, by_descriptor),
        )
        merge_kernel[(triton.cdiv(M, _MERGE_ROWS),)](
            *(parts, head.target, state.peak, state.total, state.picked, state.weighted),
            *(M, begin, end, splits, TILES * config.columns, parts.stride(0)),
            WITH_ENTROPY=state.weighted is not None,
            BLOCK_N=_MERGE_ROWS,
        )


def _dz(
    head: Head,
    tile: Tile,
    grad: RowGrad,
    kept: Tensor | None,
    block_peak: Tensor | None,
    grad_filter: float,
    config: Config,
) -> Gradient:
    """dz of a tile; target and grad are of its rows, kept and block_peak of all rows."""
    (M, H), V = tile.hidden.shape, len(head.weight)
    begin, end = tile.columns.start, tile.columns.stop
    row_blocks, column_blocks = (
        triton.cdiv(M, config.rows),
        triton.cdiv(end - begin, config.columns),
    )
    dz = tile.hidden.new_empty(M, end - begin)
    active = None
    if block_peak is not None:
        active = torch.empty(row_blocks, column_blocks, dtype=torch.int8, device=dz.device)
    if isinstance(tile.rows, slice):
        rows = None
        kept, block_peak = (None if t is None else t[tile.rows] for t in (kept, block_peak))
    else:
        rows = tile.rows
    operands, by_descriptor = _operands(tile, config)
    with torch.cuda.device_of(dz):
        grad_kernel[(row_blocks * column_blocks,)](
            *(*operands, kept, rows, tile.bias, head.target, grad.grad_logp, grad.grad_entropy),
            *(grad.logp, grad.entropy, grad.peak, grad.log_total, block_peak, active, dz),
            *(M, H, V, begin, end, *tile.hidden.stride(), *tile.weight.stride()),
            *(0 if kept is None else kept.stride(0), row_blocks, column_blocks),
            *(grad_filter, head.softcap, head.temperature),
            HAS_ROWS=rows is not None,
            HAS_BIAS=tile.bias is not None,
            HAS_SOFTCAP=head.softcap > 0,
            WITH_ENTROPY=grad.grad_entropy is not None,
            IS_KEPT=kept is not None,
            WITH_FILTER=block_peak is not None,
            **_constants(config, by_descriptor),
        )
    return Gradient(
        dz, None if active is None else ActiveBlocks(active, config.rows, config.columns)
    )


def _operands(tile: Tile, config: Config) -> tuple[tuple[Any, Any], bool]:
    """Hidden states and weight for the kernels, by descriptor where chip and steps allow it."""
    both = (tile.hidden, tile.weight)
    if not blocks.has_descriptors(tile.hidden.device) or not all(
        t.stride(1) == 1
        and t.stride(0) >= t.shape[1]  # rows that overlap, as expanded ones do, have no descriptor
        and t.stride(0) * t.element_size() % 16 == 0
        and t.data_ptr() % 16 == 0
        for t in both
    ):
        return both, False
    shapes = ([config.rows, config.depth], [config.columns, config.depth])
    described = (TensorDescriptor.from_tensor(t, s) for t, s in zip(both, shapes, strict=True))
    return tuple(described), True


def _constants(config: Config, by_descriptor: bool) -> dict[str, Any]:
    return {
        "DESCRIPTORS": by_descriptor,
        "BLOCK_N": config.rows,
        "BLOCK_V": config.columns,
        "BLOCK_H": config.depth,
        "GROUP": GROUP,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def _config(head: Head) -> Config:
    dtype, (V, H) = operand_dtype(head), head.weight.shape
    return blocks.config(head.hidden.device, dtype, H, V)
