"""One checkpoint, several MoE backends: with each one, the checkpoint must stay within the limits.

`pytest --kld-moe-backend=flashinfer_cutlass --kld-moe-backend=cutlass` runs each test once per backend.
"""

import pytest


@pytest.mark.kld(max_mean=0.05, max_p99=0.6)
def test_backend_is_within_the_limits(kld_moe_backend):
    """Each backend gets its own server, capture and row in the table."""


def test_backend_has_no_outliers(kld):
    assert kld.max < 10
    assert kld.nan_count == 0
