"""Run a warp-specialised Gluon kernel on a CPU, for its results and for the order of its barriers.

    monkeypatch.setattr(warp_specialized, "launch", Simulator(seed=0).launch)

Triton's interpreter does not know Gluon. This knows what the warp-specialised kernels call, and no
more. Blocks of threads run one after the other; the partitions of a block take turns. Barriers have
the counts, phases and bytes of PTX's mbarrier. A copy lands at some time after it was issued, and
products read their operands at some time before they are waited for; into tensor memory, they are
made in their order. A seed draws what happens next, and how often that is each partition, a copy or
products, so that all may lag far behind. Where nothing can happen any more, `DeadlockError` is
raised.

Shared and tensor memory are NaN at first, and what is read or written in global memory has to be
there. Not simulated: layouts, the warps and registers of a partition, and fences.
"""

from __future__ import annotations

import ast
import functools
import inspect
import operator
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor

from latro_kernels.linear_logprob.triton import (
    tensor_memory,
    warp_specialized,
    warp_specialized_forward,
    warp_specialized_gradient,
)


class DeadlockError(RuntimeError):
    """Every partition that has not ended waits for a barrier, and nothing is under way."""


def is_found_by_some_seed(check: Callable[[int], None]) -> bool:
    """Return whether a check fails, by its results or its barriers, with one of twelve seeds."""
    for seed in range(12):
        try:
            check(seed)
        except (AssertionError, DeadlockError):
            return True
    return False


class _StoppedError(Exception):
    """Ends the thread of a partition of a block that is given up."""


class Barrier:
    """An mbarrier: a phase is over when all have arrived and all bytes have landed."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0

    def arrive(self, count: int = 1, more_bytes: int = 0) -> None:
        assert self.pending >= count, "more arrivals than a phase of the barrier has"
        self.pending -= count
        self.land(-more_bytes)

    def land(self, size: int) -> None:
        self.bytes -= size
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count

    def is_over(self, parity: int) -> bool:
        return self.phase % 2 != parity


class Shared:
    """Shared memory: of barriers, or of numbers, of which views are made."""

    def __init__(self, data: Any) -> None:
        self.data = data

    @property
    def shape(self) -> Sequence[int]:
        return tuple(self.data.shape)

    def index(self, i: int) -> Any:
        return self.data[i] if isinstance(self.data, list) else Shared(self.data[i])

    def slice(self, start: int, length: int) -> Shared:
        return Shared(self.data[start : start + length])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order))


class TensorMemory(Shared):
    """Tensor memory, of which columns are read."""

    def index(self, i: int) -> TensorMemory:
        return TensorMemory(self.data[i])

    def slice(self, start: int, length: int) -> TensorMemory:
        return TensorMemory(self.data[:, start : start + length])

    def load(self, layout: Any) -> Tensor:
        return self.data.clone()


@dataclass
class Descriptor:
    """A matrix of which blocks are copied; what lies beyond its end is 0."""

    base: Tensor
    block_shape: Sequence[int]
    layout: None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def block_type(self) -> Any:
        rows, columns = self.block_shape
        return SimpleNamespace(nbytes=rows * columns * self.base.element_size())

    def block(self, corner: Sequence[int]) -> Tensor:
        (row, column), (rows, columns) = corner, self.block_shape
        part = self.base[row : row + rows, column : column + columns]
        out = self.base.new_zeros(rows, columns)
        out[: part.shape[0], : part.shape[1]] = part
        return out


@dataclass
class Pointer:
    """Addresses: a tensor's first, and how many numbers further."""

    to: Tensor
    offset: Any = 0

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=self.to.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.to, self.offset + offset)

    def __getitem__(self, index: Any) -> Pointer:
        return Pointer(self.to, self.offset[index])

    def memory(self, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return all numbers from the tensor's first on, and places in it where the mask is set."""
        rest = self.to.untyped_storage().nbytes() // self.to.element_size()
        numbers = self.to.as_strided((rest - self.to.storage_offset(),), (1,))
        offset, mask = torch.broadcast_tensors(self.offset, mask)
        outside = mask & ((offset < 0) | (offset >= len(numbers)))
        assert not outside.any(), "an access beyond the tensor"
        return numbers, offset.where(mask, 0).long(), mask


@dataclass
class Products:
    """Sums to which the products of operands in shared memory are added when it comes to it."""

    left: Tensor
    right: Tensor
    sums: Any

    def make(self) -> None:
        before = self.sums.sums if isinstance(self.sums, Products) else self.sums
        self.sums = before + self.left.float() @ self.right.float()


@dataclass
class ProductsInMemory:
    """Products that are written, or added, to tensor memory, and then arrive at barriers."""

    left: Tensor
    right: Tensor
    sums: Tensor
    add: bool
    barriers: Sequence[Barrier]

    def make(self) -> None:
        products = self.left.float() @ self.right.float()
        self.sums.copy_(self.sums + products if self.add else products)
        for barrier in self.barriers:
            barrier.arrive()


@dataclass
class Commit:
    """An arrival at a barrier, after the products before it."""

    barrier: Barrier

    def make(self) -> None:
        self.barrier.arrive()


class Partition(threading.Thread):
    """Some warps of a block: a thread that runs when it is given a turn."""

    def __init__(self, weight: float, function: Callable[..., None], arguments: Any) -> None:
        super().__init__(daemon=True)
        self.weight, self.function, self.arguments = weight, function, arguments
        self.turn, self.paused = threading.Semaphore(0), threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.under_way: list[Products | ProductsInMemory | Commit] = []
        self.ended = self.stopped = False
        self.error: BaseException | None = None

    def run(self) -> None:
        self.turn.acquire()
        try:
            if not self.stopped:
                self.function(*self.arguments)
        except _StoppedError:
            pass
        except BaseException as error:  # raised again in `resume`
            self.error = error
        self.ended = True
        self.paused.release()

    def resume(self) -> None:
        """Let it run until it pauses or ends."""
        self.turn.release()
        self.paused.acquire()
        if self.error is not None:
            raise self.error

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Let others run; called by the thread itself, which goes on when it is ready."""
        self.ready = ready
        self.paused.release()
        self.turn.acquire()
        if self.stopped:
            raise _StoppedError

    def make_products(self, left: int = 0) -> None:
        """Make the products that are under way, but for as many as are left."""
        while len(self.under_way) > left:
            self.under_way.pop(0).make()


class Simulator:
    """Events in the order that a seed gives.

    Args:
        seed: of the order.
        edits: texts that the kernels' modules have, each with what is put in its place.
        capability: of the GPU, 90 or 100.
        multiprocessors: of the GPU.
    """

    def __init__(
        self,
        seed: int,
        *edits: tuple[str, str],
        capability: int = 90,
        multiprocessors: int = 3,
    ) -> None:
        self.random = random.Random(seed)
        self.has_tensor_memory = capability == 100
        self.multiprocessors = multiprocessors
        self.copies: list[Callable[[], None]] = []
        self.launched: list[tuple[str, dict[str, Any]]] = []
        modules = (
            warp_specialized,
            tensor_memory,
            warp_specialized_forward,
            warp_specialized_gradient,
        )
        texts = [inspect.getsource(module) for module in modules]
        for old, new in edits:
            assert any(old in text for text in texts), old
            texts = [text.replace(old, new) for text in texts]
        self.functions: dict[str, Any] = {}
        for module, text in zip(modules, texts, strict=True):
            self.functions |= self._functions(module, text)

    def _functions(self, module: ModuleType, text: str) -> dict[str, Any]:
        """Return the functions of Gluon in a module, with this text, as functions of Python."""
        tree = ast.parse(text)
        tree.body = [of for of in tree.body if "gluon.jit" in "".join(_decorators(of))]
        language = self._language()
        names = {k: _plain(value, language) for k, value in vars(module).items()}
        for known in (vars(language), self.functions):
            names |= {k: value for k, value in known.items() if k in names}
        names["gl"] = language
        exec(compile(tree, str(module.__file__), "exec"), names)
        return {of.name: names[of.name] for of in tree.body if isinstance(of, ast.FunctionDef)}

    def launch(self, kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
        """Do what `warp_specialized.launch` does."""
        name = kernel.fn.__name__
        self.launched.append((name, arguments))
        self.programs = min(programs, self.multiprocessors)
        flags = {flag: value(arguments) for flag, value in kernel.values.items()}
        given = arguments | flags | {"STAGES": arguments["num_stages"]}
        given["TENSOR_MEMORY"] = self.has_tensor_memory
        given = {p.name: _passed(given[p.name]) for p in kernel.fn.params}
        for operand in ("hidden", "weight"):
            given[operand] = Descriptor(given[operand].base, given[operand].block_shape)
        for program in range(self.programs):
            self.program = program
            self.functions[name](**given)

    def _weight(self) -> float:
        return 10 ** self.random.uniform(-2, 2)

    def _warp_specialize(
        self, work: Sequence[tuple[Callable[..., None], Any]], warps: Any, registers: Any
    ) -> None:
        partitions = [Partition(self._weight(), *of) for of in work]
        of_copies, of_products = self._weight(), self._weight()
        self.copies.clear()
        for partition in partitions:
            partition.start()
        try:
            while not all(partition.ended for partition in partitions):
                events: list[tuple[float, Callable[[], None]]] = []
                for p in partitions:
                    if not p.ended and p.ready():
                        events.append((p.weight, p.resume))
                    if p.under_way:
                        first_of = functools.partial(p.make_products, len(p.under_way) - 1)
                        events.append((of_products, first_of))
                events += [(of_copies, copy) for copy in self.copies]
                if not events:
                    raise DeadlockError("no partition can go on")
                weights, happens = zip(*events, strict=True)
                (event,) = self.random.choices(happens, weights)
                event()
                if event in self.copies:
                    self.copies.remove(event)
        finally:
            for partition in partitions:
                partition.stopped = True
                partition.turn.release()
                partition.join()

    def _async_load(
        self, matrix: Descriptor, corner: Sequence[int], barrier: Barrier, to: Shared
    ) -> None:
        def land() -> None:
            to.data.copy_(matrix.block(corner))
            barrier.land(matrix.block_type.nbytes)

        self.copies.append(land)
        _pause()

    def _language(self) -> SimpleNamespace:
        """Return what kernels call, by name."""
        mbarrier = SimpleNamespace(
            MBarrierLayout=lambda: Barrier, init=_init, expect=_expect, arrive=_arrive, wait=_wait
        )
        return SimpleNamespace(
            **{name: getattr(torch, name) for name in ("int32", "int64", "float32", "where")},
            **{name: getattr(torch, name) for name in ("exp", "exp2", "abs")},
            constexpr=None,
            NVMMADistributedLayout=lambda *_: None,
            SliceLayout=lambda *_: None,
            static_assert=_static_assert,
            static_range=range,
            program_id=lambda axis: self.program,
            num_programs=lambda axis: self.programs,
            cdiv=lambda a, b: -(-a // b),
            cast=lambda value, dtype: value,
            arange=lambda start, end, layout: torch.arange(start, end, dtype=torch.int32),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
            max=lambda value, axis: value.amax(axis),
            sum=lambda value, axis: value.sum(axis),
            reduce_or=lambda value, axis: functools.reduce(operator.or_, value.unbind(axis)),
            maximum=lambda a, b: torch.maximum(a, torch.as_tensor(b)),
            minimum=lambda a, b: torch.minimum(a, torch.as_tensor(b)),
            fma=lambda a, b, c: (a.double() * torch.as_tensor(b, dtype=a.dtype) + c).float(),
            reshape=torch.reshape,
            permute=torch.permute,
            split=lambda value: value.unbind(-1),
            load=_load,
            store=_store,
            convert_layout=lambda value, layout: value,
            allocate_shared_memory=_allocate,
            TensorMemoryLayout=lambda block, col_stride: None,
            allocate_tensor_memory=lambda dtype, shape, layout: TensorMemory(
                _allocate(dtype, shape, layout).data
            ),
            warp_specialize=self._warp_specialize,
            mbarrier=mbarrier,
            async_load=self._async_load,
            fence_async_shared=lambda: None,
            warpgroup_mma=_warpgroup_mma,
            warpgroup_mma_wait=_warpgroup_mma_wait,
            tcgen05_mma=_tcgen05_mma,
            tcgen05_commit=_tcgen05_commit,
        )


def _decorators(of: ast.stmt) -> list[str]:
    """Return the decorators of a statement, if it is a function, and take them off."""
    if not isinstance(of, ast.FunctionDef):
        return []
    found = list(map(ast.unparse, of.decorator_list))
    of.decorator_list.clear()
    return found


def _plain(value: Any, language: SimpleNamespace) -> Any:
    """Return a global of a kernel as Python has it: constants as numbers, Triton's functions."""
    if isinstance(value, triton.language.constexpr):
        return value.value
    function = getattr(value, "fn", None)
    if not isinstance(function, FunctionType):
        return value
    names = function.__globals__
    called = {k: _plain(names[k], language) for k in function.__code__.co_names if k in names}
    return FunctionType(
        function.__code__, names | called | {"tl": language}, argdefs=function.__defaults__
    )


def _passed(value: Any) -> Any:
    """Return an argument as it reaches a kernel: floats have 32 bits."""
    if torch.is_tensor(value):
        return Pointer(value)
    return torch.tensor(value, dtype=torch.float32) if isinstance(value, float) else value


def _pause(ready: Callable[[], bool] = lambda: True) -> None:
    thread = threading.current_thread()
    assert isinstance(thread, Partition)
    thread.pause(ready)


def _static_assert(condition: bool, message: str) -> None:
    assert condition, message


def _load(pointer: Pointer, mask: Tensor, other: float) -> Tensor:
    numbers, places, mask = pointer.memory(mask)
    return numbers[places].where(mask, other)


def _store(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
    numbers, places, mask = pointer.memory(mask)
    numbers[places[mask]] = value[mask]


def _allocate(dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Any:
    if layout is Barrier:
        return Barrier() if len(shape) == 1 else Shared([Barrier() for _ in range(shape[0])])
    return Shared(torch.full(shape, torch.nan, dtype=dtype))


def _init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.pending = count


def _expect(barrier: Barrier, size: int) -> None:
    barrier.arrive(more_bytes=size)
    _pause()


def _arrive(barrier: Barrier, pred: bool = True) -> None:
    if pred:
        barrier.arrive()
    _pause()


def _wait(barrier: Barrier, parity: int) -> None:
    _pause(lambda: barrier.is_over(parity))


def _warpgroup_mma(left: Shared, right: Shared, sums: Any, is_async: bool) -> Products:
    thread = threading.current_thread()
    assert isinstance(thread, Partition)
    assert is_async
    products = Products(left.data, right.data, sums)
    thread.under_way.append(products)
    thread.pause()
    return products


def _warpgroup_mma_wait(left: int, deps: list[Products]) -> Any:
    thread = threading.current_thread()
    assert isinstance(thread, Partition)
    thread.make_products(left)
    # Sums are numbers when all of their products are made, and not before.
    return deps[0] if left > 0 else deps[0].sums


def _tcgen05_mma(
    left: Shared, right: Shared, sums: TensorMemory, use_acc: bool, mbarriers: Sequence[Barrier]
) -> None:
    _put_under_way(ProductsInMemory(left.data, right.data, sums.data, use_acc, mbarriers))


def _tcgen05_commit(barrier: Barrier) -> None:
    _put_under_way(Commit(barrier))


def _put_under_way(work: ProductsInMemory | Commit) -> None:
    thread = threading.current_thread()
    assert isinstance(thread, Partition)
    thread.under_way.append(work)
    thread.pause()
