"""Tiles of a head: a block of rows and a slice of the vocabulary, whose products torch makes.

No tensor of N × V exists: an op sweeps over the tiles and makes of each what it needs, by a kernel
of its own or, without one, of the tile's `logits` by torch's operations on every device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from threading import RLock

import torch
from torch import Tensor

from latro_kernels.head import Head

# More rows make fewer sums of dw, and narrower slices of the vocabulary, which make more of dx.
MAX_TILE_ROWS = 4096
# Blocks of rows begin at multiples of it: a program's rows, at most, and all addresses are aligned.
_ROW_GROUP = 128
# Where there is no GPU to ask: Triton's interpreter, whose kernels meet CPU tensors.
_INTERPRETED_TILE_BYTES = 2**20
# Whether cuBLAS may round what it adds up, by the dtype of the sum: attributes of
# `torch.backends.cuda.matmul`.
_MAY_ROUND = {
    torch.bfloat16: "allow_bf16_reduced_precision_reduction",
    torch.float16: "allow_fp16_reduced_precision_reduction",
}
# Autograd has a thread for each GPU, and the setting is one for all of them.
_SETTING_LOCK = RLock()
# Without kernels, a tile of 1 MiB: a CPU's caches hold some of them.
CPU_ROWS, CPU_COLUMNS = 512, 512


@dataclass(frozen=True, eq=False)
class Tile:
    """A block of M rows and a slice of C columns, in the dtype in which products are made.

    Args:
        rows: a slice of the rows, or their indices, int64 [M].
        columns: of the vocabulary.
        hidden: [M, H].
        weight: [C, H].
        bias: fp32 [C], or None.
    """

    rows: slice | Tensor
    columns: slice
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def tiles(head: Head, shape: tuple[int, int]) -> Iterator[tuple[slice, Tile]]:
    """Yield all tiles of a head, each behind its rows: of every slice its blocks of rows.

    Args:
        head: the problem.
        shape: the most rows and columns of a tile.
    """
    height, width = shape
    for columns, weight, bias in slices(head, width):
        for rows in blocks_of_rows(head.hidden.shape[0], height):
            x = head.hidden[rows].to(weight.dtype)
            yield rows, Tile(rows=rows, columns=columns, hidden=x, weight=weight, bias=bias)


def tile_shape(head: Head, *, count: int = 1) -> tuple[int, int]:
    """Return rows and columns of an fp32 tile of products, of which `count` stand side by side.

    Together they fill a GPU's second-level cache: the bound depends on neither N nor V.
    """
    device = head.hidden.device
    tile_bytes = _INTERPRETED_TILE_BYTES
    if device.type == "cuda":
        tile_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    # A `len` would fix the number of rows in torch.compile.
    rows = max(1, min(head.hidden.shape[0], MAX_TILE_ROWS))
    columns = tile_bytes // (count * rows * torch.float32.itemsize)
    # Whole groups of 64 columns keep a tile's rows, and the kernels' loads, aligned.
    return rows, min(head.weight.shape[0], max(64, columns // 64 * 64))


def blocks_of_rows(N: int, most: int) -> Iterator[slice]:
    """Yield as few blocks of rows as there can be of at most `most`, of even sizes.

    Sizes differ by a group of rows at most: a block of a few rows would leave most of a GPU idle.
    """
    group = math.gcd(most, _ROW_GROUP)
    groups, blocks = -(-N // group), -(-N // most)
    for block in range(blocks):
        begin, end = (group * (groups * of // blocks) for of in (block, block + 1))
        yield slice(begin, min(end, N))


def slices(head: Head, width: int) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Yield slices of the vocabulary, with their weight as operand and their bias in fp32."""
    V = len(head.weight)
    for begin in range(0, V, width):
        columns = slice(begin, min(begin + width, V))
        bias = None if head.bias is None else head.bias[columns].float().contiguous()
        yield columns, head.weight[columns].to(operand_dtype(head)), bias


def operand_dtype(head: Head) -> torch.dtype:
    """Return the dtype of the factors of products."""
    # On the CPU, for the interpreter, torch would round a product of bf16.
    return head.hidden.dtype if head.hidden.device.type == "cuda" else torch.float32


def add_product(out: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """Add a · b to `out`, or write it there for the first product of a sum.

    A product that is added to an fp32 sum is not rounded before; one that is written in bf16 or
    fp16 is summed in fp32, and rounded once.
    """
    if a.dtype == out.dtype:
        with _summed_in_fp32(out.dtype):
            if first:
                torch.mm(a, b, out=out)
            else:
                out.addmm_(a, b)
    elif first and out.dtype == torch.float32:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif first:
        out.copy_(torch.mm(a, b))
    elif _adds_to_fp32(out.device):
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out += torch.mm(a, b, out_dtype=out.dtype)


@contextmanager
def _summed_in_fp32(dtype: torch.dtype) -> Iterator[None]:
    """Have cuBLAS sum products of `dtype` in fp32 where it cuts their rows and columns into parts.

    torch lets it round the parts to `dtype` before it adds them (split-K), unless told otherwise;
    what the caller has told it is restored.
    """
    settings, name = torch.backends.cuda.matmul, _MAY_ROUND.get(dtype)
    if name is None:
        yield
        return
    with _SETTING_LOCK:
        before = getattr(settings, name)
        # Where it is off, more may be: setting it again would allow splits that the caller forbade.
        if before:
            setattr(settings, name, False)
        try:
            yield
        finally:
            if before:
                setattr(settings, name, True)


@cache
def _adds_to_fp32(device: torch.device) -> bool:
    """Return whether this torch adds products of bf16 to an fp32 sum; older ones refuse."""
    # Of empty matrices: torch looks at their dtypes and launches nothing, which is no wait for the
    # device, and nothing that a CUDA graph that is being captured would take up.
    out = torch.empty(0, 0, dtype=torch.float32, device=device)
    factor = torch.empty(0, 0, dtype=torch.bfloat16, device=device)
    try:
        torch.addmm(out, factor, factor, out_dtype=out.dtype, out=out)
    except RuntimeError:
        return False
    return True


def shape_without_kernels(head: Head) -> tuple[int, int]:
    """Return rows and columns of a tile for ops whose tiles torch's operations fold."""
    if head.hidden.device.type == "cuda":
        return tile_shape(head, count=2)
    return max(1, min(CPU_ROWS, head.hidden.shape[0])), min(CPU_COLUMNS, head.weight.shape[0])


def logits(head: Head, tile: Tile) -> tuple[Tensor, Tensor | None]:
    """Return the logits of a tile, in fp32, and the tanh that a softcap makes of them, or None."""
    z = tile.hidden.new_empty(len(tile.hidden), len(tile.weight), dtype=torch.float32)
    add_product(z, tile.hidden, tile.weight.t(), first=True)
    if tile.bias is not None:
        z += tile.bias
    tanh = None
    if head.softcap:
        tanh = z.div_(head.softcap).tanh_()
        z = tanh * head.softcap
    return z.div_(head.temperature), tanh


def fold(z: Tensor, row_max: Tensor, sum_exp: Tensor) -> None:
    """Add logits to the state of their rows, in place; the tile is used up."""
    new_max = torch.maximum(row_max, z.amax(1))
    # A row that is -inf so far has no maximum to subtract.
    shift = new_max.masked_fill(new_max == -torch.inf, 0)
    sum_exp *= torch.exp(row_max - shift)
    sum_exp += z.sub_(shift[:, None]).exp_().sum(1)
    row_max.copy_(new_max)
