"""Triton's interpreter without the work that it repeats in every operation.

On blocks as small as a test's, most of its time goes into types and checks that are made anew for
each addition of two numbers. What is replaced here computes the same.
"""

from __future__ import annotations

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
    context.setattr(interpreter, "_get_np_dtype", _numpy_type(interpreter._get_np_dtype))
    context.setattr(core.block_type, "__init__", _block_type(core.block_type.__init__))
    context.setattr(semantic.TritonSemantic, "binary_op_sanitize_overflow_impl", _no_overflow)


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
        key = (element_ty.name, *core._unwrap_shape(shape))
        if key not in made:
            make(self, element_ty, shape)
            made[key] = dict(vars(self))
        vars(self).update(made[key])

    return block_type


def _no_overflow(self: Any, lhs: Any, rhs: Any, operation: Callable[..., Any]) -> None:
    """Fail where integers overflow: in one operation of NumPy instead of ten of Triton."""
    dtype = lhs.type.scalar
    if dtype.int_bitwidth < 64:
        wide = (x.handle.data.astype(np.int64) for x in (lhs, rhs))
        result = OPERATIONS[operation.__name__](*wide)
        least, most = dtype.get_int_min_value(), dtype.get_int_max_value()
        assert result.min() >= least, f"{dtype} overflow in {operation.__name__}"
        assert result.max() <= most, f"{dtype} overflow in {operation.__name__}"
