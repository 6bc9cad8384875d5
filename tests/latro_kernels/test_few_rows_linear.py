"""few_rows_linear: against fp64, the same bits whatever stands beside a row, torch's machinery."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear

from latro_kernels import few_rows_linear
from latro_kernels.few_rows_linear import ops
from tests.latro_kernels.ops.op import DTYPES, INTERPRETED, gate

pytestmark = pytest.mark.skipif(INTERPRETED, reason="has no kernel in Triton")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# V and H: one of everything; odd, with pieces of the depth and groups of columns that are not full;
# an H for which CPUs multiply bf16 as such; more than threads take by rows.
SHAPES = [(1, 1), (5, 3), (193, 129), (391, 257), (40, 400), (1100, 300)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def problem(
    N: int, shape: tuple[int, int], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Make x [N, H], weight [V, H] and bias [V]."""
    V, H = shape
    random = torch.Generator().manual_seed(N + V + H)
    x, weight = torch.randn(N, H, generator=random), torch.randn(V, H, generator=random) / H**0.5
    return x.to(dtype), weight.to(dtype), torch.randn(V, generator=random).to(dtype)


def strided(t: Tensor) -> list[Tensor]:
    """Return the same matrix with gaps between its columns, between its rows, and transposed."""
    gaps = [t.repeat_interleave(2, 1)[:, ::2], t.repeat_interleave(2, 0)[::2]]
    return [*gaps, t.t().contiguous().t()]


@each_dtype
@each_shape
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("backend", ["cpu", "reference", "auto"])
def test_matches_fp64(
    shape: tuple[int, int], dtype: torch.dtype, with_bias: bool, backend: str
) -> None:
    for N in (0, 1, 8, 13, 130):
        x, weight, some = problem(N, shape, dtype)
        bias = some if with_bias else None
        got = few_rows_linear(x, weight, bias, backend=backend)
        true = linear(x.double(), weight.double(), None if bias is None else bias.double())
        assert got.dtype == dtype
        gate("y", got, true, linear(x, weight, bias))


@each_dtype
@each_shape
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_row_has_the_same_bits_whatever_others_there_are(
    shape: tuple[int, int], dtype: torch.dtype, threads: int
) -> None:
    """For each number of rows, so that it passes through panels of each width; on any threads."""
    x, weight, bias = problem(150, shape, dtype)
    expected = few_rows_linear(x, weight, bias)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for N in (1, 2, 7, 8, 9, 16, 17, 24, 25, 63, 64, 65, 150):
            assert torch.equal(few_rows_linear(x[:N], weight, bias), expected[:N]), N
            assert torch.equal(few_rows_linear(x[-N:], weight, bias), expected[-N:]), N
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads as Linux shows them")
def test_threads_stay_from_call_to_call() -> None:
    """Of layers of many sizes; making threads anew takes longer than such a layer."""
    code = """
import os, torch
from latro_kernels import few_rows_linear
torch.set_num_threads(4)
weights = [torch.ones(V, 64) for V in (5000, 8, 600)]
seen = [set(), set()]
for threads in seen:
    for x in (torch.ones(N, 64) for N in (100, 1, 8)):
        for weight in weights:
            few_rows_linear(x, weight)
            threads |= {*os.listdir("/proc/self/task")}
assert seen[1] <= seen[0], seen
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@each_dtype
def test_strided_inputs(dtype: torch.dtype) -> None:
    x, weight, bias = problem(20, (193, 129), dtype)
    expected = few_rows_linear(x, weight, bias)
    for other in strided(x):
        assert torch.equal(few_rows_linear(other, weight, bias), expected)
    for other in strided(weight):
        assert torch.equal(few_rows_linear(x, other, bias), expected)
    apart = bias.repeat_interleave(2)[::2]
    assert torch.equal(few_rows_linear(x, weight, apart), expected)


def test_any_dimensions_before_the_last() -> None:
    x, weight, bias = problem(12, (40, 7))
    expected = few_rows_linear(x, weight, bias)
    for shape in ((2, 6), (3, 1, 4), (12,), (1, 12)):
        got = few_rows_linear(x.view(*shape, 7), weight, bias)
        assert torch.equal(got, expected.view(*shape, 40))
    assert torch.equal(few_rows_linear(x[0], weight, bias), expected[0])


def test_nan_stays_in_its_row_and_its_column() -> None:
    """What fills a panel up, and words of an odd depth, reads no neighbour."""
    for dtype in DTYPES:
        x, weight, bias = problem(9, (40, 131), dtype)
        expected = few_rows_linear(x, weight, bias)
        x[3], weight[5] = torch.nan, torch.inf
        got = few_rows_linear(x, weight, bias)
        assert got[3].isnan().all()
        assert not got[:, 5].isfinite().any()
        rows, columns = torch.arange(9) != 3, torch.arange(40) != 5
        assert torch.equal(got[rows][:, columns], expected[rows][:, columns])


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_without_values(backend: str) -> None:
    x, weight, bias = problem(4, (6, 5), torch.bfloat16)
    with FakeTensorMode() as mode:
        tensors = [mode.from_tensor(t) for t in (x, weight, bias)]
        fake = few_rows_linear(*tensors, backend=backend)
    assert (fake.shape, fake.dtype) == ((4, 6), torch.bfloat16)
    meta = few_rows_linear(*(t.to("meta") for t in (x, weight, bias)), backend=backend)
    assert (meta.shape, meta.dtype) == ((4, 6), torch.bfloat16)


@each_dtype
def test_opcheck(dtype: torch.dtype) -> None:
    x, weight, bias = problem(9, (40, 131), dtype)
    torch.library.opcheck(ops.linear, (x, weight, bias))
    torch.library.opcheck(ops.linear, (x.view(3, 3, 131), weight, None))


def test_compiles_as_one_graph() -> None:
    x, weight, bias = problem(9, (40, 131))
    torch.compiler.reset()
    compiled = torch.compile(few_rows_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight, bias), few_rows_linear(x, weight, bias))


def test_parameters_are_taken_where_gradients_are_off() -> None:
    layer = torch.nn.Linear(7, 40)
    x = torch.randn(3, 7)
    with torch.no_grad():
        got = few_rows_linear(x, layer.weight, layer.bias)
        gate("y", got, layer.double()(x.double()), layer.float()(x))
    assert not got.requires_grad


X, WEIGHT = torch.zeros(4, 3), torch.zeros(5, 3)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
    ({"x": torch.zeros(4, 2)}, ValueError, r"x: expected shape \[\.\.\., H\].*H = 3.*got \(4, 2\)"),
    ({"x": torch.tensor(1.0)}, ValueError, r"x: expected shape \[\.\.\., H\].*got \(\)"),
    ({"x": X.int()}, TypeError, "x: expected dtype .*got torch.int32"),
    ({"x": X.double(), "weight": WEIGHT.double()}, TypeError, "x: expected dtype .*float64"),
    ({"weight": None}, TypeError, "weight: expected a tensor, got NoneType"),
    ({"weight": torch.zeros(3)}, ValueError, "weight: expected 2 dimensions"),
    ({"weight": WEIGHT.half()}, TypeError, "weight: expected the dtype of x, torch.float32, got"),
    ({"weight": WEIGHT.to("meta")}, ValueError, "weight: expected the device of x, cpu, got meta"),
    ({"weight": WEIGHT[:, :0], "x": X[:, :0]}, ValueError, "H = 0 > 0"),
    ({"bias": torch.zeros(4)}, ValueError, r"bias: expected shape \(5,\), got \(4,\)"),
    ({"bias": torch.zeros(5, 1)}, ValueError, "bias: expected 1 dimension"),
    ({"bias": torch.zeros(5).half()}, TypeError, "bias: expected the dtype of x"),
    ({"backend": "triton"}, ValueError, "backend: expected one of 'auto', 'reference', 'cpu'"),
    ({"backend": None}, TypeError, "backend: expected a str, got NoneType"),
    ({"x": X.clone().requires_grad_()}, ValueError, r"x: expected no gradient.*no_grad"),
    ({"weight": torch.nn.Parameter(WEIGHT)}, ValueError, "weight: expected no gradient"),
    ({"bias": torch.nn.Parameter(torch.zeros(5))}, ValueError, "bias: expected no gradient"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[case[2] for case in BAD])
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        few_rows_linear(**({"x": X, "weight": WEIGHT} | change))
