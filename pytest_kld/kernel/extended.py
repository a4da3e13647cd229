"""The extended figures per position: a second pass over the logits of both sides, on request only.

It is float64 throughout. With log p, log q the normalised log-probabilities of reference and candidate,
d = log q − log p and r = (p − q) / (p + q),

    KL(candidate ‖ reference) = Σ (q d + p − q)
    Jensen–Shannon            = ½ Σ (p log(1 + r) + q log(1 − r))      = ½ KL(p ‖ m) + ½ KL(q ‖ m), m = (p + q) / 2
    total variation           = ½ Σ |p − q|

In the first, p − q adds nothing to the sum, but it makes every term non-negative and cancels the rounding of the
normalisers. In the second, log(1 + r) is exact if p and q are nearly equal. So small figures have small relative
errors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pytest_kld.kernel.beyond import log_weight_beyond, not_finite

TOP = 5
"""The number of most probable tokens that `top5_overlap` compares."""
_EPSILON, _TINY = torch.finfo(torch.float64).eps, torch.finfo(torch.float64).tiny
_CPU_ELEMENTS = 1 << 18
"""Logits per side in one block on a CPU: they fit into the core's caches."""
_DEVICE_ELEMENTS = 1 << 24
"""Logits per side in one block on an accelerator (workspace about 1 GiB)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extended:
    """Further figures of N positions, float64 [N] each. NaN if a side is not finite, like `Divergence.kl`.

    Attributes:
        reverse_kl: KL(candidate ‖ reference) in nats; +inf if the reference gives probability 0 to a token that
            the candidate considers possible. Kullback & Leibler 1951.
        js: Jensen–Shannon divergence in nats, in [0, ln 2], symmetric. Lin 1991, doi:10.1109/18.61115.
        tv: total variation distance in [0, 1], symmetric: the largest difference between the probabilities that
            both sides give to the same event. By Pinsker's inequality tv² ≤ kl / 2.
        top5_overlap: share of the reference's five most probable tokens (the first ones if several are equal) that are
            among the candidate's five, in [0, 1].
        entropy_difference: Shannon entropy of the candidate's distribution minus the reference's, in nats.

    """

    reverse_kl: Tensor
    js: Tensor
    tv: Tensor
    top5_overlap: Tensor
    entropy_difference: Tensor


def extended_divergence(reference: Tensor, candidate: Tensor) -> Extended:
    """Compare two sets of logits position by position.

    Args:
        reference: [N, V_r], any float dtype. −inf means probability 0.
        candidate: [N, V_c], any float dtype, same device. Columns beyond the shorter vocabulary are cut.

    Returns:
        One `Extended` of length N on the CPU. Never raises for non-finite values.

    """
    vocab_size = min(reference.shape[1], candidate.shape[1])
    elements = _CPU_ELEMENTS if reference.device.type == "cpu" else _DEVICE_ELEMENTS
    rows = max(1, elements // vocab_size)
    blocks = [
        _block(reference[start : start + rows], candidate[start : start + rows], vocab_size)
        for start in range(0, len(reference), rows)
    ]
    return Extended(
        **{field.name: torch.cat([getattr(block, field.name) for block in blocks]).cpu() for field in fields(Extended)}
    )


def _block(reference: Tensor, candidate: Tensor, vocab_size: int) -> Extended:
    z_r, z_c = reference[:, :vocab_size], candidate[:, :vocab_size]
    log_p, log_q = z_r.double().log_softmax(-1), z_c.double().log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    bad = ~(z_r.amax(-1).isfinite() & z_c.amax(-1).isfinite())
    for side in (reference, candidate):
        bad = bad | not_finite(log_weight_beyond(side, vocab_size))
    p_minus_q = p - q
    # If q is 0, log q may be −inf; here 0 · (−inf) counts as 0.
    reverse_kl = torch.where(q == 0, p, q * (log_q - log_p) + p_minus_q).sum(-1)
    # If p or q is negligible against the other, r is ±1 and one logarithm is −∞: its product is 0 to within an ε.
    r = (p_minus_q / (p + q).clamp(min=_TINY)).clamp(min=_EPSILON - 1, max=1 - _EPSILON)
    js = (p * r.log1p() + q * (-r).log1p()).sum(-1) / 2
    figures = Extended(
        reverse_kl=reverse_kl.clamp(min=0),  # only the rounding of the sum can make it negative
        js=js.clamp(min=0, max=math.log(2)),
        tv=(p_minus_q.abs().sum(-1) / 2).clamp(max=1),
        top5_overlap=(_top(z_r) & _top(z_c)).sum(-1, dtype=torch.float64) / min(TOP, p.shape[1]),
        entropy_difference=_entropy(q, log_q) - _entropy(p, log_p),
    )
    return Extended(
        **{field.name: getattr(figures, field.name).masked_fill(bad, math.nan) for field in fields(figures)}
    )


def _entropy(p: Tensor, log_p: Tensor) -> Tensor:
    return -torch.where(p == 0, p, p * log_p).sum(-1)


def _top(z: Tensor) -> Tensor:
    """Mark the `TOP` greatest of each row; among those equal to the smallest of them, the first ones count."""
    top = min(TOP, z.shape[1])
    least = z.topk(top, dim=-1).values[:, -1:]
    member = z >= least
    tied = (member.sum(-1) > top).nonzero().squeeze(-1)
    if len(tied):
        greater, equal = z[tied] > least[tied], z[tied] == least[tied]
        room = top - greater.sum(-1, keepdim=True)
        member[tied] = greater | (equal & (equal.cumsum(-1) <= room))
    return member
