"""What the classes of settings are made of."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import field, fields
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np

from latro.config.ranges import check_number

WEIGHT_DTYPES = ("float32", "bfloat16", "float16")


def setting(default: Any, text: str, *aliases: str, **kwargs: Any) -> Any:
    """Return a dataclass field with a help text and further names for the command line."""
    metadata: dict[str, Any] = {"help": text, **kwargs}
    if aliases:
        metadata["aliases"] = [f"--{alias}" for alias in aliases]
    return field(default=default, metadata=metadata)


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """Return the types that an annotation admits."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def check_settings(settings: Any) -> None:
    """Check that numbers are numbers, flags are flags, and words are among a field's choices.

    Those of numpy become Python's.

    A command line sees to it; a dataclass takes anything, and transformers then reads "false" as
    true, and a sampling strategy that it does not know as random.

    Raises:
        TypeError: a setting is no whole number, no number, or neither True nor False.
        ValueError: it is none of the choices.
    """
    hints = get_type_hints(type(settings))
    for f in fields(settings):
        value, kinds = getattr(settings, f.name), set(kinds_of(hints[f.name]))
        if isinstance(value, np.generic):
            # Settings are written as JSON, which has none of numpy's numbers.
            value = value.item()
            setattr(settings, f.name, value)
        if value is None and NoneType in kinds:
            continue
        kinds.discard(NoneType)
        enums = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)]
        choices = f.metadata.get("choices") or [e.value for kind in enums for e in kind]
        if choices:
            one_of(f.name, value, choices)
        elif kinds == {bool}:
            if not isinstance(value, bool):
                raise TypeError(f"{f.name}: expected True or False, got {value!r}")
        elif kinds == {int}:
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{f.name}: expected a whole number, got {value!r}")
        elif kinds == {float}:
            check_number(f.name, value)


def one_of(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise ValueError for a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def json_object(name: str, text: str) -> dict[str, Any]:
    """Return the object that `text` is as JSON; raise ValueError where it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: expected a JSON object, got {text!r}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{name}: expected a JSON object, got {text!r}")
    return found
