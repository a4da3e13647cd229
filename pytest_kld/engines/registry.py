"""The served engines by name. An engine's module is imported on request."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_kld.engines.served.kind import ServerKind

SERVED = {"sglang": "pytest_kld.engines.sglang.kind", "vllm": "pytest_kld.engines.vllm.kind"}
"""The module with each engine's `KIND`. An engine's name is also that of the package that it is imported from."""


def served_kind(name: str) -> ServerKind:
    """Return a served engine by name.

    Raises:
        KeyError: no served engine has that name.

    """
    kind: ServerKind = import_module(SERVED[name]).KIND
    return kind
