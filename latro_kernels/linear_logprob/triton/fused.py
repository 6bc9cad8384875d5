"""`linear_logprob` in Triton without a tile of logits in memory: the kernels in their loops.

The forward is one launch over the whole vocabulary and one that merges. The backward makes dz of a
tile in one launch, from products that it makes again or that were cached, and leaves the rest to
`head_gradient`. With a frozen head the forward goes slice by slice, and multiplies a slice's
exponentials with the weight; `fused_frozen` says how it makes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from latro_kernels.head import Head
from latro_kernels.head_gradient import Gradient, sweep
from latro_kernels.linear_logprob.state import RowGrad, State, Wanted
from latro_kernels.linear_logprob.triton import blocks
from latro_kernels.linear_logprob.triton.blocks import Config
from latro_kernels.linear_logprob.triton.fused_forward import forward_kernel, merge_kernel
from latro_kernels.linear_logprob.triton.fused_frozen import (
    redo_kernel,
    rescale_kernel,
    shift_kernel,
)
from latro_kernels.linear_logprob.triton.fused_gradient import grad_kernel
from latro_kernels.linear_logprob.triton.sparse_product import SparseGradient
from latro_kernels.logit_tiles import (
    Tile,
    add_product,
    blocks_of_rows,
    operand_dtype,
    slices,
    tiles,
)

# Of dz. The columns are the same for any N: a sum over them has the same parts. Many of both make
# few sums of dx and dw; dz then passes through memory, at a tenth of its products' time.
TILE_ROWS, TILE_COLUMNS = 8192, 8192
# Blocks of columns that a program folds, and row blocks that share a block of the weight.
TILES, GROUP = 4, 16
# Nats that a row's maximum may be above what is subtracted of its logits: exponentials are then
# below e^40, and their sum over a vocabulary, times weights, far below 2^128, where fp32 and bf16
# end; fp16 ends below e^12.
_MAX_RISE, _MAX_RISE_OF_FP32 = {torch.float16: 8.0}, 40.0
# Bytes, of which a descriptor wants rows to begin at multiples.
_ALIGNMENT = 16
_MERGE_ROWS, _RESCALE_COLUMNS = 64, 1024


def forward(head: Head, state: State, config: Config | None = None) -> None:
    """Fill `state` in one sweep; `config` is as `blocks.config` says if None."""
    config = config or shape_of_blocks(head)
    state.clear()
    N = len(head.hidden)
    if N == 0:
        return
    if state.dx_sum is not None:
        for rows in blocks_of_rows(N, TILE_ROWS):
            _forward_with_dx(replace(head, hidden=head.hidden[rows]), state.rows(rows), config)
        return
    cached = state.cached.view(N, -1) if state.cached.numel() else None
    for rows, tile in fitting_tiles(head):
        of_tile = None if cached is None else cached[rows, tile.columns]
        _fold(head, tile, state.rows(rows), of_tile, config)


def _forward_with_dx(head: Head, state: State, config: Config) -> None:
    """Fold every slice of the vocabulary into `state`, its `dx_sum` too."""
    (M, H), width = head.hidden.shape, min(TILE_COLUMNS, len(head.weight))
    dx_sum, dtype = state.dx_sum, head.hidden.dtype
    limit = _MAX_RISE.get(dtype, _MAX_RISE_OF_FP32)
    assert dx_sum is not None
    x = _fitting(head.hidden.to(operand_dtype(head)))
    shift = _logit_of_target(head, state.target)
    # Rows that begin at multiples of 128 bytes are stored and read fastest.
    buffer = torch.empty(M, -(-width // 64) * 64, dtype=x.dtype, device=x.device)

    def rescale(dx_sum: Tensor | None, limit: float, factor: float) -> None:
        with torch.cuda.device_of(x):
            rescale_kernel[(M,)](
                dx_sum_ptr=dx_sum,
                shift_ptr=shift,
                row_max_ptr=state.row_max,
                H=H,
                limit=limit,
                temperature=head.temperature,
                factor=factor,
                BLOCK_H=_RESCALE_COLUMNS,
            )

    for columns, weight, bias in slices(head, width):
        tile = Tile(slice(0, M), columns, hidden=x, weight=_fitting(weight), bias=bias)
        e, is_first = buffer[:, : len(weight)], columns.start == 0
        _fold(head, tile, state, None, config, exponentials=(e, shift))
        _redo(head, tile, state, config, exponentials=(e, shift), limit=limit)
        rescale(None if is_first else dx_sum, limit, factor=1.0)
        # A GPU has rounded as it stored; Triton's interpreter, which multiplies in fp32, has not.
        add_product(dx_sum, e.to(dtype).to(x.dtype), weight, first=is_first)
    rescale(dx_sum, -torch.inf, factor=1.0 / head.temperature)


def _logit_of_target(head: Head, target: Tensor) -> Tensor:
    """Return a logit of each row, [N], before it is divided by the temperature."""
    shift = torch.empty(len(target), dtype=torch.float32, device=target.device)
    with torch.cuda.device_of(shift):
        shift_kernel[(len(target),)](
            hidden_ptr=head.hidden,
            weight_ptr=head.weight,
            bias_ptr=None if head.bias is None else head.bias.float().contiguous(),
            target_ptr=target,
            shift_ptr=shift,
            H=head.hidden.shape[1],
            V=len(head.weight),
            stride_xn=head.hidden.stride(0),
            stride_xh=head.hidden.stride(1),
            stride_wv=head.weight.stride(0),
            stride_wh=head.weight.stride(1),
            softcap=head.softcap,
            BLOCK_H=_RESCALE_COLUMNS,
        )
    return shift


def _redo(
    head: Head,
    tile: Tile,
    state: State,
    config: Config,
    *,
    exponentials: tuple[Tensor, Tensor],
    limit: float,
) -> None:
    """Make exponentials again of rows whose maximum is more than `limit` above their shift."""
    e, shift = exponentials
    row_blocks = triton.cdiv(len(e), config.rows)
    splits = triton.cdiv(len(tile.weight), TILES * config.columns)
    with torch.cuda.device_of(e):
        redo_kernel[(row_blocks * splits,)](
            target_ptr=state.target,
            shift_ptr=shift,
            row_max_ptr=state.row_max,
            exp_ptr=e,
            N=len(e),
            stride_en=e.stride(0),
            row_blocks=row_blocks,
            splits=splits,
            limit=limit,
            TILES=TILES,
            **product_arguments(head, tile, config),
        )


def fitting_tiles(head: Head) -> Iterator[tuple[slice, Tile]]:
    """Return all rows, and a tile of them and all columns; several where operands are copied.

    A copy is then of a tile's size. Rows' results have the same bits: slices end where a program's
    columns do.
    """
    # In the dtype that the kernels are given, which in the interpreter is another.
    hidden, weight = (operand.to(operand_dtype(head)) for operand in (head.hidden, head.weight))
    height = len(hidden) if _fits(hidden) else TILE_ROWS
    width = len(weight) if _fits(weight) else TILE_COLUMNS
    return tiles(head, (height, width))


def empty_state(head: Head, target: Tensor, wanted: Wanted) -> State:
    """Return room for what `forward` makes."""
    return State.empty(
        head, target, wanted, cached_step=TILE_COLUMNS, block_columns=shape_of_blocks(head).columns
    )


def backward(
    head: Head,
    grad: RowGrad,
    cached: Tensor,
    block_max: Tensor | None,
    grad_filter: float,
    needs: tuple[bool, ...],
    config: Config | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of hidden, in fp32, weight and bias; None where none is needed.

    config: as in `forward`.
    """
    config, N = config or shape_of_blocks(head), len(head.hidden)
    rows = grad.active_rows()
    if block_max is not None:
        rows = grad.filter_order(block_max, grad_filter, rows)
    whole = cached.view(N, -1) if cached.numel() else None

    def make(tile: Tile) -> Gradient:
        products = None
        if whole is not None and tile.columns.stop <= whole.shape[1]:
            products = whole[:, tile.columns]
        return _dz(
            head,
            tile,
            grad.rows(tile.rows),
            config,
            cached=products,
            block_max=block_max,
            grad_filter=grad_filter,
        )

    return sweep(head, needs, (TILE_ROWS, TILE_COLUMNS), make, rows)


def _fold(
    head: Head,
    tile: Tile,
    state: State,
    cached: Tensor | None,
    config: Config,
    *,
    exponentials: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:
    """Add a tile of all rows to `state`; `cached` receives products of its first columns.

    exponentials: room for those of the tile, and the rows' shift.
    """
    M, begin, end = len(tile.hidden), tile.columns.start, tile.columns.stop
    if cached is not None and not cached.shape[1]:
        cached = None
    row_blocks = triton.cdiv(M, config.rows)
    splits = triton.cdiv(end - begin, TILES * config.columns)
    e, shift = exponentials
    sums = (state.weighted_sum, state.square_sum, state.logit_sum)
    statistics = 3 + sum(made is not None for made in sums)
    parts = torch.empty(statistics, splits, M, dtype=torch.float32, device=tile.hidden.device)
    arguments = product_arguments(head, tile, config) | {
        "target_ptr": state.target,
        "parts_ptr": parts,
        "cached_ptr": cached,
        "exp_ptr": e,
        "shift_ptr": shift,
        "block_max_ptr": state.block_max,
        "N": M,
        "V": len(head.weight),
        "cached_end": begin if cached is None else begin + cached.shape[1],
        "stride_cn": 0 if cached is None else cached.stride(0),
        "stride_en": 0 if e is None else e.stride(0),
        "stride_part": parts.stride(0),
        "row_blocks": row_blocks,
        "splits": splits,
        "WITH_ENTROPY": state.weighted_sum is not None,
        "WITH_FURTHER_SUMS": state.square_sum is not None,
        "TILES": TILES,
    }
    with torch.cuda.device_of(tile.hidden):
        if config.warp_specialized and e is None and state.square_sum is None:
            from latro_kernels.linear_logprob.triton import warp_specialized as specialized
            from latro_kernels.linear_logprob.triton import warp_specialized_forward as form

            specialized.launch(form.warp_specialized_kernel, row_blocks * splits, arguments)
        else:
            forward_kernel[(row_blocks * splits,)](**arguments)
    merge(parts, tile.columns, state, config)


def merge(parts: Tensor, columns: slice, state: State, config: Config) -> None:
    """Add the parts of all rows, [3, 4 or 6, splits, N], to `state`."""
    _, splits, N = parts.shape
    with torch.cuda.device_of(parts):
        merge_kernel[(triton.cdiv(N, _MERGE_ROWS),)](
            parts_ptr=parts,
            target_ptr=state.target,
            row_max_ptr=state.row_max,
            sum_exp_ptr=state.sum_exp,
            target_logit_ptr=state.target_logit,
            weighted_sum_ptr=state.weighted_sum,
            square_sum_ptr=state.square_sum,
            logit_sum_ptr=state.logit_sum,
            N=N,
            begin=columns.start,
            end=columns.stop,
            splits=splits,
            split_columns=TILES * config.columns,
            stride_part=parts.stride(0),
            BLOCK_N=_MERGE_ROWS,
        )


def _dz(
    head: Head,
    tile: Tile,
    grad: RowGrad,
    config: Config,
    *,
    cached: Tensor | None = None,
    block_max: Tensor | None = None,
    grad_filter: float = 0.0,
) -> Gradient:
    """Return dz of a tile; `grad` is of its rows, `cached` and `block_max` are of all rows."""
    M, columns = len(tile.hidden), len(tile.weight)
    row_blocks = triton.cdiv(M, config.rows)
    column_blocks = triton.cdiv(columns, config.columns)
    dz = tile.hidden.new_empty(M, columns)
    active = None
    if block_max is not None:
        active = torch.empty(row_blocks, column_blocks, dtype=torch.int8, device=dz.device)
    indices: Tensor | None = None
    if isinstance(tile.rows, slice):
        cached, block_max = (None if t is None else t[tile.rows] for t in (cached, block_max))
    else:
        indices = tile.rows
    arguments = product_arguments(head, tile, config) | {
        "cached_ptr": cached,
        "rows_ptr": indices,
        **grad.pointers(),
        "block_max_ptr": block_max,
        "active_ptr": active,
        "dz_ptr": dz,
        "M": M,
        "V": len(head.weight),
        "stride_cn": 0 if cached is None else cached.stride(0),
        "row_blocks": row_blocks,
        "column_blocks": column_blocks,
        "grad_filter": grad_filter,
    }
    programs = row_blocks * column_blocks
    is_plain = cached is None and block_max is None and grad.grad_square is None
    with torch.cuda.device_of(dz):
        if config.warp_specialized and is_plain:
            from latro_kernels.linear_logprob.triton import warp_specialized as specialized
            from latro_kernels.linear_logprob.triton import warp_specialized_gradient as form

            specialized.launch(form.warp_specialized_grad_kernel, programs, arguments)
        else:
            grad_kernel[(programs,)](**arguments)
    return (
        Gradient(dz)
        if active is None
        else SparseGradient(dz, active, (config.rows, config.columns))
    )


def _fits(operand: Tensor) -> bool:
    """Return whether the kernels take hidden or weight as it lies in memory.

    Addresses serve any strides. A chip that copies blocks by itself (TMA) is given a descriptor,
    which wants rows that are dense, that do not overlap, as expanded ones do, and that begin at
    multiples of 16 bytes.
    """
    step, size = operand.stride(0), operand.element_size()
    return not blocks.has_descriptors(operand.device) or (
        operand.stride(1) == 1
        and step >= operand.shape[1]
        and step * size % _ALIGNMENT == 0
        and operand.data_ptr() % _ALIGNMENT == 0
    )


def _fitting(operand: Tensor) -> Tensor:
    """Return hidden or weight of a tile as the kernels take it, a copy where it does not fit.

    By address, blocks of 256 columns would wait for loads of two bytes, and their sums would leave
    the registers in every step: a copy takes far less time.
    """
    if _fits(operand):
        return operand
    M, H = operand.shape
    group = _ALIGNMENT // operand.element_size()
    return operand.new_empty(M, -(-H // group) * group)[:, :H].copy_(operand)


def product_arguments(head: Head, tile: Tile, config: Config) -> dict[str, Any]:
    """Return the arguments of a kernel that makes logits of a tile's columns."""
    x, w = _fitting(tile.hidden), _fitting(tile.weight)
    hidden: Tensor | TensorDescriptor = x
    weight: Tensor | TensorDescriptor = w
    if blocks.has_descriptors(x.device):
        hidden = TensorDescriptor.from_tensor(x, [config.rows, config.depth])
        weight = TensorDescriptor.from_tensor(w, [config.columns, config.depth])
    return {
        "hidden": hidden,
        "weight": weight,
        "bias_ptr": tile.bias,
        "H": head.hidden.shape[1],
        "begin": tile.columns.start,
        "end": tile.columns.stop,
        "stride_xn": x.stride(0),
        "stride_xh": x.stride(1),
        "stride_wv": w.stride(0),
        "stride_wh": w.stride(1),
        "softcap": head.softcap,
        "temperature": head.temperature,
        "BLOCK_N": config.rows,
        "BLOCK_V": config.columns,
        "BLOCK_H": config.depth,
        "GROUP": GROUP,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def shape_of_blocks(head: Head) -> Config:
    """Return the shape of a block of products for a head."""
    dtype, (V, H) = operand_dtype(head), head.weight.shape
    return blocks.config(head.hidden.device, dtype, H, V)
