"""Forwards of modules that others have made, replaced by ours around them."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any


def replace_forward(module: Any, forward: Callable[..., Any], own: str) -> bool:
    """Make `forward` that of a module, once; return whether it was not yet.

    Args:
        module: any module; its forward so far stays as its attribute of the name `own`.
        forward: a function whose first argument is the module.
        own: a name that belongs to this replacement alone.
    """
    if getattr(module, own, module.forward) != module.forward:
        # Another library may have put its own forward before ours since then, and hands keywords
        # on to it. A model that was pickled has the attribute, and the forward of its class.
        return False
    setattr(module, own, module.forward)
    # A bound method, as a class's own is: copies of the module have one that is bound to them.
    module.forward = MethodType(forward, module)
    return True
