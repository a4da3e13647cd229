"""The part of one side's distribution beyond the common vocabulary: its weight, and whether it is finite."""

from __future__ import annotations

import torch
from torch import Tensor

_ELEMENTS = 1 << 22
"""Logits that are processed at a time in float64."""


def log_weight_beyond(z: Tensor, vocab_size: int) -> Tensor | None:
    """Return the log-sum-exp of each row's columns from `vocab_size` on.

    Args:
        z: [N, V], any float dtype.
        vocab_size: columns that both sides have.

    Returns:
        [N], float64: −inf if these columns have no weight, +inf or NaN if one of them is not finite. None if there are
        no such columns, so that sides of equal width cost nothing.

    """
    if z.shape[1] == vocab_size:
        return None
    rows = max(1, _ELEMENTS // (z.shape[1] - vocab_size))
    blocks = torch.split(z[:, vocab_size:], rows)
    return torch.cat([block.double().logsumexp(-1) for block in blocks])


def not_finite(beyond: Tensor | None) -> Tensor | bool:
    """Tell in which rows [N] a column beyond the common vocabulary is NaN or +inf."""
    return False if beyond is None else ~(beyond < torch.inf)
