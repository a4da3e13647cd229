"""The test that runs where nobody wrote one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_kld.session.kld import KLD


def test_kld(_kld_gate: KLD) -> None:
    """Gate the candidate: the limits are checked after this body."""
