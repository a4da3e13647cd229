"""The test that runs if nobody wrote one."""

import pytest


@pytest.mark.usefixtures("_kld_gate")
def test_kld() -> None:
    """Gate the candidate: the limits are checked after this body."""
