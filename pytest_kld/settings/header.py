"""The line in pytest's header."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_kld import __version__
from pytest_kld.plain import plain

if TYPE_CHECKING:
    from pytest_kld.settings.config import KLDConfig


def header(config: KLDConfig) -> str | None:
    """Return the line for pytest's header, or None if there is nothing to gate."""
    if config.ref is None and not config.candidate:
        return None
    from pytest_kld.settings.engines import describe_engine

    reference = config.ref.label if config.ref else "none"
    engine = describe_engine(config)
    return plain(f"kld: pytest-kld {__version__}, engine {engine}, reference {reference}, cache {config.cache_dir}")
