"""One checkpoint, several MoE kernels: each must stay as close to the reference as the checkpoint allows.

`pytest --kld-moe-backend=flashinfer_cutlass --kld-moe-backend=cutlass` runs each test once per backend.
"""

import pytest


@pytest.mark.kld(max_mean=0.05, max_p99=0.6)
def test_backend_is_within_the_limits(kld_moe_backend):
    """A server, a capture and a row in the table for each backend."""


def test_backend_has_no_outliers(kld):
    assert kld.max < 10
    assert kld.nan_count == 0
