"""Checks of arguments that the ops share.

Each raises with the argument's name, what was expected and what came: `TypeError` for a wrong type
or dtype, `ValueError` for the rest.
"""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed import ProcessGroup

# What the kernels read; the references take fp64 as well.
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What the kernels compute with.
_FP32 = torch.finfo(torch.float32)
# What counts and indices are held in.
_INT64 = torch.iinfo(torch.int64)


def dense(name: str, value: object) -> Tensor:
    """Return the value; raise unless it is a tensor, and one that lies in memory with strides."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got one of {value.layout}")
    return value


def check_tensor(name: str, value: object, dimensions: int) -> None:
    """Raise unless the value is a tensor of that many dimensions."""
    value = dense(name, value)
    if value.dim() != dimensions:
        raise ValueError(
            f"{name}: expected {dimensions} dimension{'s'[: dimensions - 1]}, "
            f"got shape {tuple(value.shape)}"
        )


def check_batch(name: str, value: object) -> None:
    """Raise unless the value is a tensor of rows, with any number of dimensions before the last."""
    if dense(name, value).dim() == 0:
        raise ValueError(f"{name}: expected 1 dimension or more, got shape ()")


def check_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless `value` is on the device of `other`."""
    if value.device != other.device:
        raise ValueError(
            f"{name}: expected the device of {other_name}, {other.device}, got {value.device}"
        )


def check_same_dtype(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless `value` has the dtype of `other`."""
    if value.dtype != other.dtype:
        raise TypeError(
            f"{name}: expected the dtype of {other_name}, {other.dtype}, got {value.dtype}"
        )


def check_dtype(name: str, value: Tensor, *dtypes: torch.dtype) -> None:
    """Raise unless the tensor is of one of these dtypes."""
    if value.dtype not in dtypes:
        expected = " or ".join(map(str, dtypes))
        raise TypeError(f"{name}: expected dtype {expected}, got {value.dtype}")


def check_float_dtype(name: str, value: Tensor, backend: str) -> None:
    """Raise unless `backend` computes with the dtype of the value."""
    further = (torch.float64,) if backend == "reference" else ()
    check_dtype(name, value, *KERNEL_DTYPES, *further)


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise unless these are hidden [..., H], weight [V, H] and bias [V] of one device."""
    check_batch("hidden", hidden)
    tensors = [("weight", weight, 2)]
    if bias is not None:
        tensors.append(("bias", bias, 1))
    for name, value, dimensions in tensors:
        check_tensor(name, value, dimensions)
        check_device(name, value, "hidden", hidden)
    H, V = hidden.shape[-1], weight.shape[0]
    if V == 0 or H == 0 or weight.shape[1] != H:
        raise ValueError(
            f"weight: expected shape [V, H] with V > 0 and H = {H} > 0, as in hidden, "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape[0] != V:
        raise ValueError(f"bias: expected shape ({V},), as weight has rows, got {bias.shape[0]}")


def check_positive(name: str, value: object) -> None:
    """Raise unless the value is above 0 and a normal number of fp32; others have fewer digits."""
    number = as_float(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name}: expected a finite number above 0, got {number}")
    if not _FP32.tiny <= number <= _FP32.max:
        raise ValueError(
            f"{name}: expected a number that fp32 holds, of {_FP32.tiny:.3g} to {_FP32.max:.3g}, "
            f"got {number}"
        )


def check_scales(temperature: object, softcap: object) -> None:
    """Raise unless the kernels can divide by temperature and softcap (None: none) in fp32."""
    check_positive("temperature", temperature)
    if softcap is None:
        return
    check_positive("softcap", softcap)
    # The backward multiplies a logit by temperature / softcap to find its tanh.
    least = as_float("temperature", temperature) * _FP32.tiny
    if as_float("softcap", softcap) < least:
        raise ValueError(
            f"softcap: expected {least:.3g} or more with temperature={temperature}, got {softcap}"
        )


def check_type(name: str, value: object, expected: type) -> None:
    """Raise unless the value is an instance of `expected`."""
    if not isinstance(value, expected):
        raise TypeError(f"{name}: expected a {expected.__name__}, got {type(value).__name__}")


def check_group(group: object, backend: object) -> None:
    """Raise unless the group is None, or one of processes that `backend` can split a head over."""
    if group is None:
        return
    check_type("group", group, ProcessGroup)
    if backend == "reference":
        raise ValueError(
            "group: expected None with backend 'reference', which takes the whole weight"
        )


def check_target(target: object, rows_of: str, rows: Tensor) -> None:
    """Raise unless the target is int64 and has an entry for each row of `rows`, on its device.

    `rows_of` is the name of `rows`. The target's values are not read.
    """
    target = dense("target", target)
    check_device("target", target, rows_of, rows)
    if target.shape != rows.shape[:-1]:
        raise ValueError(
            f"target: expected shape {tuple(rows.shape[:-1])}, as {rows_of} has rows, "
            f"got {tuple(target.shape)}"
        )
    check_dtype("target", target, torch.int64)


def check_target_values(
    target: Tensor,
    V: int | Tensor,
    ignore_index: int | None = None,
    *,
    name: str = "target",
    per_row: int = 1,
) -> None:
    """Raise unless all values are in 0..V − 1 or `ignore_index`; `per_row` of them are of one row.

    A GPU's values cannot be read without a wait: there the device stops. Fake tensors and those of
    the meta device have no values, and are not checked.
    """
    bad = (target < 0) | (target >= V)
    if ignore_index is not None:
        bad &= target != ignore_index
    if target.device.type != "cpu" or isinstance(target, FakeTensor):
        # A V that lies on the device is not read for its message either.
        last = "V - 1" if isinstance(V, Tensor) else V - 1
        torch._assert_async(~bad.any(), f"{name}: expected values in 0..{last}")
    elif bool(bad.any()):
        first = int(bad.flatten().nonzero()[0])
        raise ValueError(
            f"{name}: expected values in 0..{V - 1}, got {int(target.flatten()[first])} "
            f"in row {first // per_row}"
        )


def check_vector(name: str, value: object, *dtypes: torch.dtype) -> None:
    """Raise unless the value is a tensor of one dimension and of one of these dtypes."""
    value = dense(name, value)
    check_dtype(name, value, *dtypes)
    if value.dim() != 1:
        raise ValueError(f"{name}: expected one dimension, got shape {tuple(value.shape)}")


def check_same(name: str, value: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise unless the tensor has that shape and device."""
    if value.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")


def as_int(name: str, value: object) -> int:
    """Return an int, which may be numpy's, as Python's, which alone every library takes.

    Raise unless it is one, and int64 holds it, as ops and tensors take it.
    """
    if not isinstance(value, (int, Integral)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    number = int(value)
    if not _INT64.min <= number <= _INT64.max:
        raise ValueError(f"{name}: expected an int that int64 holds, got {number}")
    return number


def as_count(name: str, value: object, least: int) -> int:
    """Return an int as `as_int` does; raise unless it is at least `least`."""
    number = as_int(name, value)
    if number < least:
        raise ValueError(f"{name}: expected {least} or more, got {number}")
    return number


def check_number(name: str, value: object) -> None:
    """Raise unless the value is a finite number, in fp32 too; fp32 may make 0 of a small one."""
    number = as_float(name, value)
    if not -math.inf < number < math.inf:
        raise ValueError(f"{name}: expected a finite number, got {number}")
    if abs(number) > _FP32.max:
        raise ValueError(
            f"{name}: expected a number that fp32 holds, up to {_FP32.max:.3g}, got {number}"
        )


def as_float(name: str, value: object) -> float:
    """Return a number as a float, an int that is too large for one as infinity."""
    if not isinstance(value, (int, float, Real)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        return -math.inf if value < 0 else math.inf


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise unless the value is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
