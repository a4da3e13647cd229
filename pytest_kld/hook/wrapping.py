"""Wrapping an engine's methods, each at most once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

MARK = "_pytest_kld_hooked"
"""The attribute of a function that this package has put in."""


def wrap(owner: type, name: str, around: Callable[..., Any]) -> None:
    """Replace a method by `around(original, …)`, which gets the method's own arguments; once only.

    Raises:
        AttributeError: there is no such method.

    """
    original = getattr(owner, name)
    if hasattr(original, MARK):
        return

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(wrapper, MARK, True)
    setattr(owner, name, wrapper)


def require_parameters(method: Callable[..., Any], parameters: Sequence[str], engine: str) -> None:
    """Check the names of a method's parameters.

    Raises:
        RuntimeError: they are others in this release of the engine.

    """
    found = list(inspect.signature(method).parameters)
    if found != list(parameters):
        raise RuntimeError(f"this release of {engine} is not supported: {method.__qualname__} takes {', '.join(found)}")
