"""The kernel: figures per position from the logits of both sides. Pure torch, no I/O.

With z the logits of one position over the common vocabulary, m = max z, a = exp(z_r − m_r),
b = exp(z_c − m_c), S = Σ, the log ratio of the unnormalised weights is u = log b − log a, and with
φ(u) = eᵘ − 1 − u ≥ 0

    KL(reference ‖ candidate) = Σ a φ(u) / S_r − φ(log S_c − log S_r)

which is Σ p (log p − log q) rearranged (Σ p = Σ q = 1). Each term of the sum is non-negative, so no numbers as large as
the logits cancel: even in float32, two nearly equal distributions give a small number with a small *relative* error,
and equal ones give exactly 0. The second term corrects for using m instead of the normalisers. It is small
unless the candidate's maximum moved relative to everything else; the rounding error is relative to the first term.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pytest_kld.kernel.beyond import log_weight_beyond, not_finite
from pytest_kld.kernel.reduction import Reduction, eager_reduction

REFERENCE_NON_FINITE = 1
"""Flag bit: the reference's row holds NaN or +inf, or is −inf in every column that both sides have."""
CANDIDATE_NON_FINITE = 2
"""Flag bit: the same for the candidate's row."""
NO_LABEL = 4
"""Flag bit: the position has no next token (the last one of a window)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Figures of N positions; every field has shape [N].

    Attributes:
        kl: KL(reference ‖ candidate) in nats, float64. NaN if a flag says that a side is not finite;
            +inf if the candidate gives probability 0 to a token that the reference considers possible (with a
            probability above the smallest number of the dtype used for the computation: e⁻¹⁰³ in float32).
        reference_nll: −log p(label) under the reference in nats, float64; NaN without a label.
        candidate_nll: −log p(label) under the candidate; likewise.
        reference_entropy: Shannon entropy of the reference's distribution in nats, float64.
        reference_confidence: the reference's probability of its most probable token, float64.
        reference_argmax: the reference's most probable token (the first one if several are equal), int32.
        candidate_argmax: the candidate's most probable token; likewise.
        reference_cut_mass: the reference's probability of the columns that the candidate lacks, float64; 0 if it lacks
            none. Every other figure is computed from the remaining columns, renormalised.
        candidate_cut_mass: the candidate's probability of the columns that the reference lacks. The KL to its whole
            distribution is greater by −log(1 − candidate_cut_mass).
        flags: bits REFERENCE_NON_FINITE, CANDIDATE_NON_FINITE and NO_LABEL, uint8.

    """

    kl: Tensor
    reference_nll: Tensor
    candidate_nll: Tensor
    reference_entropy: Tensor
    reference_confidence: Tensor
    reference_argmax: Tensor
    candidate_argmax: Tensor
    reference_cut_mass: Tensor
    candidate_cut_mass: Tensor
    flags: Tensor


def divergence(
    reference: Tensor, candidate: Tensor, labels: Tensor, *, reduction: Reduction | None = None
) -> Divergence:
    """Compare two sets of logits position by position.

    Columns beyond the shorter vocabulary are cut and the remaining ones are renormalised (softmax does that by
    construction). The result says how much was cut. A value in the cut columns that is not finite invalidates its row,
    as any other does. Shifting a row by a constant changes nothing, so log-probabilities work as well as logits.

    Args:
        reference: [N, V_r], any float dtype. −inf means probability 0.
        candidate: [N, V_c], any float dtype, same device.
        labels: [N], the next token's id, or −1 if there is none; below min(V_r, V_c).
        reduction: how a row is summed; by default `eager_reduction`. See `compiled_reduction`.

    Returns:
        One `Divergence` of length N on the CPU. Never raises for non-finite values: they are flagged.

    """
    vocab_size = min(reference.shape[1], candidate.shape[1])
    dtype = torch.promote_types(torch.promote_types(reference.dtype, candidate.dtype), torch.float32)
    z_r, z_c = reference[:, :vocab_size].to(dtype), candidate[:, :vocab_size].to(dtype)
    m_r, m_c, argmax_r, argmax_c, sums = (reduction or eager_reduction)(z_r, z_c)
    weight_r, weight_c, phi, a_log_a = (value.double() for value in sums)

    log_ratio = weight_c.log() - weight_r.log()
    kl = phi / weight_r - (torch.expm1(log_ratio) - log_ratio)
    entropy = weight_r.log() - a_log_a / weight_r

    no_label = labels < 0
    index = labels.clamp(min=0).to(torch.int64)[:, None]
    nll_r = _nll(z_r, m_r, weight_r, index).masked_fill(no_label, math.nan)
    nll_c = _nll(z_c, m_c, weight_c, index).masked_fill(no_label, math.nan)

    beyond_r, beyond_c = log_weight_beyond(reference, vocab_size), log_weight_beyond(candidate, vocab_size)
    bad_r, bad_c = ~m_r.isfinite() | not_finite(beyond_r), ~m_c.isfinite() | not_finite(beyond_c)
    flags = bad_r * REFERENCE_NON_FINITE + bad_c * CANDIDATE_NON_FINITE + no_label * NO_LABEL
    return Divergence(
        # Only the rounding of the sums can make it negative.
        kl=kl.clamp(min=0).masked_fill(bad_r | bad_c, math.nan).cpu(),
        reference_nll=nll_r.masked_fill(bad_r, math.nan).cpu(),
        candidate_nll=nll_c.masked_fill(bad_c, math.nan).cpu(),
        reference_entropy=entropy.masked_fill(bad_r, math.nan).cpu(),
        reference_confidence=(1 / weight_r).masked_fill(bad_r, math.nan).cpu(),
        reference_argmax=argmax_r.to(torch.int32).cpu(),
        candidate_argmax=argmax_c.to(torch.int32).cpu(),
        reference_cut_mass=_cut_mass(beyond_r, m_r, weight_r).masked_fill(bad_r, math.nan).cpu(),
        candidate_cut_mass=_cut_mass(beyond_c, m_c, weight_c).masked_fill(bad_c, math.nan).cpu(),
        flags=flags.to(torch.uint8).cpu(),
    )


def _cut_mass(beyond: Tensor | None, m: Tensor, weight: Tensor) -> Tensor:
    if beyond is None:
        return torch.zeros_like(weight)
    return torch.sigmoid(beyond - (m.double() + weight.log()))


def _nll(z: Tensor, m: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    return weight.log() - (z.gather(1, index).squeeze(1).double() - m.double())
