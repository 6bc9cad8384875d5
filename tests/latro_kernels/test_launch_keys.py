"""A batch of any number of rows is launched with the kernels of every other, and compiles none.

Triton compiles a kernel anew for each key of a launch: the types of its arguments, and of integers
whether they are 1 or a multiple of 16. Launches are recorded here instead of made, as on an H100.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from latro_kernels import GroupLayout, head_gradient, logit_tiles

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime import Heuristics
from triton.runtime.jit import create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from latro_kernels.group_advantage import triton as group_kernels
from latro_kernels.head import Head
from latro_kernels.linear_logprob.state import RowGrad, Wanted
from latro_kernels.linear_logprob.triton import (
    blocks,
    fused,
    sparse_product,
    warp_specialized,
    warp_specialized_forward,
    warp_specialized_gradient,
)
from latro_kernels.linear_sample.state import Draw
from latro_kernels.linear_sample.triton import draw
from latro_kernels.linear_sample.triton import fused as sample_fused

H, V = 16, 1008
RAGGED = (1, *range(8_191, 8_209))

Key = tuple[Any, ...]


class Recorder:
    """Stands in the place of a kernel, and takes down what it would be compiled for."""

    def __init__(self, kernel: Any) -> None:
        self.heuristics = {}
        while isinstance(kernel, Heuristics):
            self.heuristics |= kernel.values
            kernel = kernel.fn
        self.params = kernel.params
        self.types: dict[str, str] = {}
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self.bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        self.keys: dict[Key, set[Key]] = {}
        self.launched: list[dict[str, Any]] = []
        self.grids: list[Any] = []

    @property
    def fn(self) -> Recorder:
        """What has the parameters, as of a kernel with heuristics."""
        return self

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        self.grids.append(grid)
        return self.launch

    def launch(self, **given: Any) -> None:
        given |= {name: value(given) for name, value in self.heuristics.items()}
        _, key, options = self.bind(**given)
        names = (p.name for p in self.params)
        self.types |= {name: type_ for name, (type_, *_) in zip(names, key, strict=True)}
        form = [
            given[p.name] if p.is_constexpr else given[p.name] is None
            for p in self.params
            if p.is_constexpr or p.name.endswith("_ptr")
        ]
        self.keys.setdefault(tuple(form), set()).add((*map(tuple, key), str(options)))
        self.launched.append(given)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorder]:
    """Put a recorder in the place of each kernel of a fused driver; return them by name."""
    monkeypatch.setattr(blocks, "_INTERPRETED", blocks.start(9, torch.bfloat16))
    monkeypatch.setattr(blocks, "has_descriptors", lambda device: True)
    monkeypatch.setattr(fused, "TILE_COLUMNS", 512)
    recorders = {}
    for module, name in (
        (fused, "forward_kernel"),
        (fused, "merge_kernel"),
        (fused, "grad_kernel"),
        (fused, "redo_kernel"),
        (fused, "rescale_kernel"),
        (fused, "shift_kernel"),
        (sparse_product, "sparse_product_kernel"),
        (sample_fused, "sample_kernel"),
        (draw, "choose_kernel"),
    ):
        recorders[name] = Recorder(getattr(module, name))
        monkeypatch.setattr(module, name, recorders[name])
    return recorders


def head_of(N: int, V: int = V, H: int = H, dtype: torch.dtype = torch.float32) -> Head:
    return Head(
        hidden=torch.zeros(N, H, dtype=dtype),
        weight=torch.zeros(V, H, dtype=dtype),
        bias=None,
        temperature=1.0,
        softcap=0.0,
        backend="triton",
    )


def solve(
    head: Head,
    *,
    entropy: bool = False,
    square: bool = False,
    frozen: bool = False,
    budget: int = 0,
    grad_filter: float = 0.0,
    unasked: int = 0,
) -> None:
    """Launch a forward and a backward; `unasked` rows have no upstream gradient."""
    N = len(head.hidden)
    wanted = Wanted(
        weighted_sum=entropy or square,
        further_sums=square,
        dx_sum=frozen,
        block_max=grad_filter > 0,
        memory_budget=budget,
    )
    state = fused.empty_state(head, torch.zeros(N, dtype=torch.int64), wanted)
    fused.forward(head, state)
    if frozen:
        return
    rows = torch.ones(N)
    rows[:unasked] = 0
    grad = RowGrad(
        target=state.target,
        logp=rows,
        row_max=rows,
        log_sum=rows,
        grad_logp=rows,
        grad_entropy=rows if entropy or square else None,
        offset=rows if entropy or square else None,
        grad_square=rows if square else None,
    )
    fused.backward(head, grad, state.cached, state.block_max, grad_filter, (True, True, False))


FORMS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "plain": ({}, ("forward", "merge", "grad")),
    "entropy": ({"entropy": True}, ("forward", "merge", "grad")),
    "square": ({"square": True}, ("forward", "merge", "grad")),
    "some kept": ({"budget": 4 * 8_300 * 512}, ("forward", "merge", "grad")),
    "all kept": ({"budget": 2**30}, ("forward", "merge", "grad")),
    "frozen": ({"frozen": True}, ("shift", "forward", "merge", "redo", "rescale")),
    "some asked": ({"unasked": 100}, ("forward", "merge", "grad")),
    "filtered": ({"grad_filter": 1e-4}, ("forward", "merge", "grad", "sparse_product")),
}


@pytest.mark.parametrize("form", FORMS)
def test_ragged_batches_share_their_kernels(form: str, recorded: dict[str, Recorder]) -> None:
    options, kernels = FORMS[form]
    for N in RAGGED:
        solve(head_of(N), **options)
    launched = {name for name, recorder in recorded.items() if recorder.launched}
    assert launched == {f"{name}_kernel" for name in kernels}
    for name in launched:
        for keys in recorded[name].keys.values():
            assert len(keys) == 1, f"{name} is compiled for {keys}"


def test_ragged_batches_share_the_warp_specialised_kernels(
    recorded: dict[str, Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    specialized = []
    for module, name in (
        (warp_specialized_forward, "warp_specialized_kernel"),
        (warp_specialized_gradient, "warp_specialized_grad_kernel"),
    ):
        specialized.append(Recorder(getattr(module, name)))
        monkeypatch.setattr(module, name, specialized[-1])
    monkeypatch.setattr(blocks, "_INTERPRETED", blocks.WARP_SPECIALIZED)
    for module in (fused, logit_tiles):  # as on a GPU
        monkeypatch.setattr(module, "operand_dtype", lambda head: head.hidden.dtype)
    multiprocessors = SimpleNamespace(multi_processor_count=60, major=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: multiprocessors)
    monkeypatch.setattr(head_gradient, "add_product", lambda *_, first: None)  # CPUs have no such
    for N in RAGGED:
        solve(head_of(N, dtype=torch.bfloat16))
    for recorder in specialized:
        (keys,) = recorder.keys.values()
        assert len(keys) == 1
        # As many programs as there is work for, and no more than run at a time.
        grids = {programs for (programs,) in recorder.grids}
        assert min(grids) < max(grids) == 60
    for name in ("forward_kernel", "grad_kernel"):
        assert not recorded[name].launched


@pytest.mark.parametrize("form", ["square", "all kept", "filtered"])
def test_what_the_warp_specialised_dz_is_not_for(
    form: str, recorded: dict[str, Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_INTERPRETED", blocks.WARP_SPECIALIZED)
    monkeypatch.setattr(warp_specialized, "launch", lambda *_: None)
    solve(head_of(300), **FORMS[form][0])
    assert recorded["grad_kernel"].launched
    # Nor is the forward for further sums.
    assert bool(recorded["forward_kernel"].launched) is (form == "square")


def test_ragged_batches_are_sampled_by_the_same_kernels(recorded: dict[str, Recorder]) -> None:
    for N in RAGGED:
        numbers = torch.zeros(N, dtype=torch.int64)
        draw_ = Draw(seed=numbers, position=numbers, greedy=False, first_column=None)
        sample_fused.sample(head_of(N), draw_)
    for name in ("sample_kernel", "choose_kernel", "merge_kernel"):
        assert recorded[name].launched
        for keys in recorded[name].keys.values():
            assert len(keys) == 1, f"{name} is compiled for {keys}"


def test_a_vocabulary_of_any_size_has_one_kernel_more(recorded: dict[str, Recorder]) -> None:
    """Its last slice, where stores of dz are narrow; the forward alone stores nothing of it."""
    for N in RAGGED:
        solve(head_of(N, V=1001))
    (keys,) = recorded["grad_kernel"].keys.values()
    assert len(keys) == 2
    (keys,) = recorded["forward_kernel"].keys.values()
    assert len(keys) == 1


def test_strides_that_loads_depend_on_have_kernels_of_their_own(
    recorded: dict[str, Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "has_descriptors", lambda device: False)
    for width in (16, 24):
        solve(head_of(64, H=width))
    for name in ("forward_kernel", "grad_kernel"):
        (keys,) = recorded[name].keys.values()
        assert len(keys) == 2


@pytest.mark.parametrize("form", ["plain", "some kept", "frozen", "filtered"])
def test_operands_that_no_descriptor_takes_have_the_kernels_of_others(
    form: str, recorded: dict[str, Recorder]
) -> None:
    """They are copied, a tile at a time: kernels that read by address are for older chips."""
    fitting = head_of(300)
    turned = replace(fitting, weight=torch.zeros(H, V).t(), hidden=torch.zeros(300, 2 * H)[:, ::2])
    for head in (fitting, turned):
        solve(head, **FORMS[form][0])
    for name in ("forward_kernel", "redo_kernel" if form == "frozen" else "grad_kernel"):
        launched = recorded[name].launched
        assert launched
        assert all(isinstance(of["hidden"], TensorDescriptor) for of in launched)
        for keys in recorded[name].keys.values():
            assert len(keys) == 1, f"{name} is compiled for {keys}"
    slices = {(of["begin"], of["end"]) for of in recorded["forward_kernel"].launched}
    assert slices >= {(0, 512), (512, V)}


def test_operands_that_no_descriptor_takes_are_sampled_from_in_slices(
    recorded: dict[str, Recorder],
) -> None:
    numbers = torch.zeros(300, dtype=torch.int64)
    draw_ = Draw(seed=numbers, position=numbers, greedy=False, first_column=None)
    sample_fused.sample(replace(head_of(300), weight=torch.zeros(H, V).t()), draw_)
    launched = recorded["sample_kernel"].launched
    assert [(of["begin"], of["end"]) for of in launched] == [(0, 512), (512, V)]
    assert all(isinstance(of["weight"], TensorDescriptor) for of in launched)


def test_a_few_rows_more_make_no_small_tile(recorded: dict[str, Recorder]) -> None:
    solve(head_of(8_200))
    assert {given["M"] for given in recorded["grad_kernel"].launched} == {4_096, 4_104}
    recorded["forward_kernel"].launched.clear()
    solve(head_of(8_200), frozen=True)
    assert {given["N"] for given in recorded["forward_kernel"].launched} == {4_096, 4_104}


@pytest.mark.parametrize("kl", ["reward", "k3", "exact"])
def test_numbers_reach_kernels_in_fp64_as_fp64(kl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton passes a float as fp32 where nothing says otherwise."""
    recorders = {}
    for name in ("sums_kernel", "coefficient_kernel"):
        recorders[name] = Recorder(getattr(group_kernels, name))
        monkeypatch.setattr(group_kernels, name, recorders[name])
    rows = torch.zeros(8)
    given = (rows, None, rows) if kl == "exact" else (rows, rows, None)
    outputs = tuple(torch.zeros(n) for n in (4, 4, 4, 4, 4, 8))
    layout = GroupLayout(torch.arange(9), 2)
    group_kernels.forward(
        outputs, given, layout, beta=0.1, answer_weight=0.7, kl=kl, unfinished="floor"
    )
    types = [recorder.types for recorder in recorders.values()]
    assert types[0]["beta"] == "fp64"
    assert [types[1][name] for name in ("scale", "beta", "answer_weight")] == ["fp64"] * 3
