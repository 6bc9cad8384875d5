"""How rows are cut into blocks."""

from __future__ import annotations

import pytest

from latro_kernels.head_gradient import row_blocks


@pytest.mark.parametrize("most", [1, 6, 24, 128, 2048, 4096, 8192])
@pytest.mark.parametrize("N", [0, 1, 127, 129, 2049, 8191, 8192, 8200, 16_385, 30_721])
def test_blocks_of_rows_are_few_and_even(N: int, most: int) -> None:
    blocks = list(row_blocks(N, most))
    edges = [0, *(block.stop for block in blocks)]
    assert [block.start for block in blocks] == edges[:-1]
    assert edges[-1] == N
    assert len(blocks) == -(-N // most)
    sizes = [block.stop - block.start for block in blocks]
    group = max(g for g in range(1, 129) if most % g == 0 and 128 % g == 0)
    assert all(block.start % group == 0 for block in blocks)
    assert all(0 < size <= most for size in sizes)
    # The last group of rows need not be full.
    assert max(sizes, default=0) - min(sizes, default=0) < 2 * group


def test_a_few_rows_more_are_no_block_of_their_own() -> None:
    assert list(row_blocks(8200, 8192)) == [slice(0, 4096), slice(4096, 8200)]
