"""The built-in gate. `pytest --pyargs pytest_kld.gate_only` runs it and collects nothing else."""

from __future__ import annotations

import pytest


@pytest.mark.usefixtures("_kld_gate")
def test_kld() -> None:
    """Gate the candidate: the limits are checked after this body."""
