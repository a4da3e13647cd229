"""The built-in gate, which `pytest --pyargs pytest_kld.gate_only` runs alone, and the test of a matrix."""

from __future__ import annotations

import pytest


@pytest.mark.usefixtures("_kld_gate")
def test_kld() -> None:
    """Gate the candidate: the limits are checked after this body."""


@pytest.mark.usefixtures("_kld_matrix")
def test_kld_matrix() -> None:
    """Compare candidates with each other: the limit on their pairs is checked after this body."""
