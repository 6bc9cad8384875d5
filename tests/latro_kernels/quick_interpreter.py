"""Triton's interpreter without the work that it repeats in every operation.

On blocks as small as a test's, most of its time goes into types and checks that are made anew for
each addition of two numbers. What is replaced here computes the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from triton.language import core, semantic
from triton.runtime import interpreter

OPERATIONS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def make_quick(context: pytest.MonkeyPatch) -> None:
    """Patch the interpreter, for as long as the context lasts."""
    context.setattr(interpreter, "_patch_lang", _patch_once(interpreter._patch_lang))
    context.setattr(interpreter, "_patch_attr", _patch_attr)
    context.setattr(interpreter, "_get_np_dtype", _numpy_type(interpreter._get_np_dtype))
    context.setattr(core, "_unwrap_if_constexpr", _unwrap(core._unwrap_if_constexpr))
    context.setattr(core.block_type, "__init__", _block_type(core.block_type.__init__))
    # What a builder is given is the type itself.
    context.setattr(core.block_type, "to_ir", lambda self, builder: self)
    context.setattr(core.tensor, "__init__", _tensor)
    of_all = semantic.TritonSemantic
    context.setattr(of_all, "binary_op_sanitize_overflow_impl", _no_overflow)
    context.setattr(of_all, "broadcast_impl_value", _broadcast(of_all.broadcast_impl_value))
    of_one_type = _of_one_type(of_all.binary_op_type_checking_impl)
    context.setattr(of_all, "binary_op_type_checking_impl", of_one_type)


def _patch_once(patch: Callable[..., Any]) -> Callable[..., Any]:
    """Replace the functions of the language once for each module, not in every call of a kernel."""
    patched = set()

    def patch_once(fn: Callable[..., Any]) -> Any:
        # Globals are those of a module, which lives as long as the session.
        if id(fn.__globals__) not in patched:
            patched.add(id(fn.__globals__))
            patch(fn)
        # Of nothing to undo after a kernel.
        return interpreter._LangPatchScope()

    return patch_once


def _numpy_type(find: Callable[..., Any]) -> Callable[..., Any]:
    """Look a type up once, not in a dictionary of all that is made for it."""
    found: dict[str, Any] = {}

    def numpy_type(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in found:
            found[name] = find(dtype)
        return found[name]

    return numpy_type


def _block_type(make: Callable[..., Any]) -> Callable[..., Any]:
    """Check a shape and write its name once."""
    made: dict[tuple[Any, ...], dict[str, Any]] = {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = shape.values if type(shape) is core.tuple else shape
        key = (element_ty.name, *sizes)
        if key not in made:
            make(self, element_ty, shape)
            made[key] = dict(vars(self))
        vars(self).update(made[key])

    return block_type


def _patch_attr(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    """Call a function of the language at once, not through two others that see to one argument."""
    function = getattr(member, "__wrapped__", member)

    def call(*args: Any, _semantic: Any = None, **kwargs: Any) -> Any:
        return function(*args, _semantic=interpreter.interpreter_semantic, **kwargs)

    scope.set_attr(obj, name, call)


def _unwrap(unwrap: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """See first what is most frequent: tensors, numbers and constants."""
    plain = {core.tensor, int, float, bool, type(None)}

    def quick(o: Any) -> Any:
        kind = type(o)
        return o if kind in plain else o.value if kind is core.constexpr else unwrap(o)

    return quick


_SHAPES: dict[str, tuple[Any, Any]] = {}


def _tensor(self: Any, handle: Any, type: Any) -> None:
    """Make the constants of a shape once for each type."""
    name = type.name if type.is_block() else ""
    if name not in _SHAPES:
        sizes = [*type.shape] if name else []
        shape = core.tuple([core.constexpr(size) for size in sizes])
        _SHAPES[name] = core.constexpr(math.prod(sizes)), shape
    self.handle = handle
    self.type = type
    self.dtype = type.scalar
    self.numel, self.shape = _SHAPES[name]


def _broadcast(broadcast: Callable[..., Any]) -> Callable[..., Any]:
    """Make blocks of as many dimensions alike without comparing constants one by one."""

    def as_large(x: Any, shape: list[int]) -> Any:
        if x.type.shape.values == shape:
            return x
        handle = interpreter.TensorHandle(np.broadcast_to(x.handle.data, shape), x.handle.dtype)
        return core.tensor(handle, core.block_type(x.dtype, shape))

    def quick(self: Any, lhs: Any, rhs: Any) -> Any:
        a, b = lhs.type, rhs.type
        if a.is_block() and b.is_block():
            a, b = a.shape.values, b.shape.values
            if a == b:
                return lhs, rhs
            if len(a) == len(b) and all(m == n or 1 in (m, n) for m, n in zip(a, b, strict=True)):
                shape = [n if m == 1 else m for m, n in zip(a, b, strict=True)]
                return as_large(lhs, shape), as_large(rhs, shape)
        return broadcast(self, lhs, rhs)

    return quick


def _of_one_type(check: Callable[..., Any]) -> Callable[..., Any]:
    """Take tensors of one type as they are, and make a number that stands beside one once."""
    plain = {"fp32": (float, int), "int32": (int,), "int64": (int,)}
    made: dict[tuple[Any, ...], Any] = {}

    def constant(self: Any, value: Any, beside: Any) -> Any:
        """Return a number as a tensor, or None where the language has to see to its type."""
        dtype = beside.dtype
        if type(value) not in plain.get(dtype.name, ()):
            return None
        if type(value) is float and (not value or math.isnan(value)):
            # 0.0 equals -0.0, and NaN nothing.
            return None
        if dtype.is_int() and not dtype.get_int_min_value() <= value <= dtype.get_int_max_value():
            return None
        key = (value, type(value), beside.type.name)
        if key not in made:
            made[key] = self.broadcast_impl_value(beside, self.scalar_constant(value, dtype))[1]
            made[key].handle.data.flags.writeable = False
        return made[key]

    def quick(self: Any, lhs: Any, rhs: Any, *options: Any, **more: Any) -> Any:
        if "arithmetic_check" in more:
            return check(self, lhs, rhs, *options, **more)
        if type(lhs) is core.tensor:
            if type(rhs) is core.tensor:
                if lhs.type.name == rhs.type.name and lhs.dtype.name in plain:
                    return lhs, rhs
            elif (number := constant(self, rhs, lhs)) is not None:
                return lhs, number
        elif type(rhs) is core.tensor and (number := constant(self, lhs, rhs)) is not None:
            return number, rhs
        return check(self, lhs, rhs, *options, **more)

    return quick


def _no_overflow(self: Any, lhs: Any, rhs: Any, operation: Callable[..., Any]) -> None:
    """Fail where integers overflow: in one operation of NumPy instead of ten of Triton."""
    dtype = lhs.type.scalar
    if dtype.int_bitwidth < 64:
        wide = (x.handle.data.astype(np.int64) for x in (lhs, rhs))
        result = OPERATIONS[operation.__name__](*wide)
        least, most = dtype.get_int_min_value(), dtype.get_int_max_value()
        assert result.min() >= least, f"{dtype} overflow in {operation.__name__}"
        assert result.max() <= most, f"{dtype} overflow in {operation.__name__}"
