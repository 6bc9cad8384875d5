"""What the classes of settings are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Any

WEIGHT_DTYPES = ("float32", "bfloat16", "float16")


def setting(default: Any, text: str, *aliases: str, **kwargs: Any) -> Any:
    """Return a dataclass field with a help text and further names for the command line."""
    metadata: dict[str, Any] = {"help": text, **kwargs}
    if aliases:
        metadata["aliases"] = [f"--{alias}" for alias in aliases]
    return field(default=default, metadata=metadata)


def one_of(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError for a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
