"""The served engines by name. An engine's module is imported on request."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_kld.engines.served.kind import ServerKind

_SERVED = {"sglang": "pytest_kld.engines.sglang.kind"}
"""The module with each engine's `KIND`."""


def served_kind(name: str) -> ServerKind:
    """Return a served engine by name.

    Raises:
        KeyError: no served engine has that name.

    """
    kind: ServerKind = import_module(_SERVED[name]).KIND
    return kind
