"""The kernel: figures per position from the logits of both sides. Pure torch, no I/O.

With z the logits of one position over the common vocabulary, m = max z, a = exp(z_r − m_r),
b = exp(z_c − m_c), S = Σ, the log ratio of the unnormalised weights is u = log b − log a, and with
φ(u) = eᵘ − 1 − u ≥ 0

    KL(reference ‖ candidate) = Σ a φ(u) / S_r − φ(log S_c − log S_r)

which is Σ p (log p − log q) rearranged (Σ p = Σ q = 1). Each term of the sum is non-negative, so nothing of the
size of the logits cancels: two nearly equal distributions give a small number with small *relative* error,
and equal ones give exactly 0, in float32. The second term corrects for m in place of the normalisers. It is small
unless the candidate's maximum moved against everything else; the rounding error is relative to the first term.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

REFERENCE_NON_FINITE = 1
"""Flag bit: the reference's row holds NaN or +inf, or is −inf everywhere."""
CANDIDATE_NON_FINITE = 2
"""Flag bit: the candidate's row holds NaN or +inf, or is −inf everywhere."""
NO_LABEL = 4
"""Flag bit: the position has no next token (the last one of a window)."""

_MASKED = -1e30
"""Stands in for −inf on the reference's side, so that 0 · (−inf) cannot arise there."""
_CACHED_ELEMENTS = 1 << 20
"""Logits per side in one eager block on a CPU: what stays in the core's caches."""
_DEVICE_ELEMENTS = 1 << 26
"""Logits per side in one eager block on an accelerator: few launches, bounded workspace (1 GiB)."""
_SUMMED_COLUMNS = 16_384
"""Columns that the compiled pass adds up in float32; one running sum over a whole vocabulary would be off by 1e-5."""
_TILE_COLUMNS = 2048
"""Columns whose maximum is taken at once."""

Sums = tuple[Tensor, Tensor, Tensor, Tensor]
Reduction = Callable[[Tensor, Tensor, Tensor, Tensor], Sums]


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Figures of N positions; every field has shape [N].

    Attributes:
        kl: KL(reference ‖ candidate) in nats, float64. NaN where a flag says that a side is not finite;
            +inf where the candidate gives probability 0 to a token that the reference deems possible (by more
            than the least number of the dtype that is computed in: e⁻¹⁰³ in float32).
        reference_nll: −log p(label) under the reference in nats, float64; NaN without a label.
        candidate_nll: the same under the candidate.
        reference_entropy: Shannon entropy of the reference's distribution in nats, float64.
        reference_confidence: the reference's probability of its most probable token, float64.
        reference_argmax: the reference's most probable token (the first, among equals), int32.
        candidate_argmax: the candidate's.
        flags: bits REFERENCE_NON_FINITE, CANDIDATE_NON_FINITE and NO_LABEL, uint8.

    """

    kl: Tensor
    reference_nll: Tensor
    candidate_nll: Tensor
    reference_entropy: Tensor
    reference_confidence: Tensor
    reference_argmax: Tensor
    candidate_argmax: Tensor
    flags: Tensor


def divergence(
    reference: Tensor, candidate: Tensor, labels: Tensor, *, reduction: Reduction | None = None
) -> Divergence:
    """Compare two sets of logits position by position.

    Columns beyond the shorter vocabulary are cut and what is left is renormalised (softmax does that by
    construction). Shifting a row by a constant changes nothing, so log-probabilities do as well as logits.

    Args:
        reference: [N, V_r], any float dtype. −inf means probability 0.
        candidate: [N, V_c], any float dtype, same device.
        labels: [N], the next token's id, or −1 where there is none; below min(V_r, V_c).
        reduction: how a row is summed; by default `eager_reduction`. See `compiled_reduction`.

    Returns:
        One `Divergence` of length N on the CPU. Never raises for non-finite values: they are flagged.

    """
    vocab_size = min(reference.shape[1], candidate.shape[1])
    dtype = torch.promote_types(torch.promote_types(reference.dtype, candidate.dtype), torch.float32)
    z_r, z_c = reference[:, :vocab_size].to(dtype), candidate[:, :vocab_size].to(dtype)
    m_r, argmax_r = _row_max(z_r)
    m_c, argmax_c = _row_max(z_c)
    sums = (reduction or eager_reduction)(z_r, z_c, m_r, m_c)
    weight_r, weight_c, phi, a_log_a = (value.double() for value in sums)

    log_ratio = weight_c.log() - weight_r.log()
    kl = phi / weight_r - (torch.expm1(log_ratio) - log_ratio)
    entropy = weight_r.log() - a_log_a / weight_r

    no_label = labels < 0
    index = labels.clamp(min=0).to(torch.int64)[:, None]
    nll_r = _nll(z_r, m_r, weight_r, index).masked_fill(no_label, math.nan)
    nll_c = _nll(z_c, m_c, weight_c, index).masked_fill(no_label, math.nan)

    bad_r, bad_c = ~m_r.isfinite(), ~m_c.isfinite()
    flags = bad_r * REFERENCE_NON_FINITE + bad_c * CANDIDATE_NON_FINITE + no_label * NO_LABEL
    return Divergence(
        # Below 0 there is only the rounding of the sums.
        kl=kl.clamp(min=0).masked_fill(bad_r | bad_c, math.nan).cpu(),
        reference_nll=nll_r.masked_fill(bad_r, math.nan).cpu(),
        candidate_nll=nll_c.masked_fill(bad_c, math.nan).cpu(),
        reference_entropy=entropy.masked_fill(bad_r, math.nan).cpu(),
        reference_confidence=(1 / weight_r).masked_fill(bad_r, math.nan).cpu(),
        reference_argmax=argmax_r.to(torch.int32).cpu(),
        candidate_argmax=argmax_c.to(torch.int32).cpu(),
        flags=flags.to(torch.uint8).cpu(),
    )


def eager_reduction(z_r: Tensor, z_c: Tensor, m_r: Tensor, m_c: Tensor) -> Sums:
    """Sum each row with plain torch operations in one reused workspace.

    Args:
        z_r: [N, V] logits of the reference.
        z_c: [N, V] logits of the candidate.
        m_r: [N] their maxima.
        m_c: [N] their maxima.

    Returns:
        Σ a, Σ b, Σ a φ(u) and Σ a log a, each [N].

    """
    positions, vocab_size = z_r.shape
    elements = _CACHED_ELEMENTS if z_r.device.type == "cpu" else _DEVICE_ELEMENTS
    rows = max(1, min(positions, elements // vocab_size))
    # Fresh temporaries of this size would cost more in page faults than the arithmetic on them.
    workspace = torch.empty(4, rows, vocab_size, dtype=z_r.dtype, device=z_r.device)
    sums = [torch.empty(positions, dtype=z_r.dtype, device=z_r.device) for _ in range(4)]
    for start in range(0, positions, rows):
        block = slice(start, min(start + rows, positions))
        x, y, u, a = workspace[:, : block.stop - start]
        torch.sub(z_r[block], m_r[block, None], out=x).clamp_(min=_MASKED)
        torch.sub(z_c[block], m_c[block, None], out=y)
        torch.sub(y, x, out=u)
        torch.exp(x, out=a)
        y.exp_()
        torch.sum(a, -1, out=sums[0][block])
        torch.sum(y, -1, out=sums[1][block])
        torch.sum(x.mul_(a), -1, out=sums[3][block])
        torch.expm1(u, out=x).sub_(u).mul_(a)
        torch.where(u > 60, y, x, out=x)  # a eᵘ = b, and a (1 + u) vanishes beside it: exact where eᵘ overflows
        x.nan_to_num_(nan=0.0, posinf=math.inf)  # 0 · inf: neither side gives the token any probability
        torch.sum(x, -1, out=sums[2][block])
    return sums[0], sums[1], sums[2], sums[3]


def compiled_reduction() -> Reduction:
    """Compile the same sums into one pass over both matrices (`torch.compile`).

    Compiling takes some seconds and a C++ compiler (on CUDA: Triton), so it pays for large jobs only.
    """
    with warnings.catch_warnings(action="ignore"):  # torch's compiler uses what torch deprecates
        one_pass = torch.compile(_one_pass, dynamic=False)

    def reduction(z_r: Tensor, z_c: Tensor, m_r: Tensor, m_c: Tensor) -> Sums:
        width = min(_SUMMED_COLUMNS, z_r.shape[1])
        whole = z_r.shape[1] // width * width
        parts = [
            one_pass(z_r[:, start : start + width], z_c[:, start : start + width], m_r, m_c)
            for start in range(0, whole, width)
        ]
        if whole < z_r.shape[1]:  # another shape would be compiled again
            parts.append(eager_reduction(z_r[:, whole:], z_c[:, whole:], m_r, m_c))
        first, second, third, fourth = (torch.stack(sums).double().sum(0) for sums in zip(*parts, strict=True))
        return first, second, third, fourth

    return reduction


def _one_pass(z_r: Tensor, z_c: Tensor, m_r: Tensor, m_c: Tensor) -> Sums:
    x = (z_r - m_r[:, None]).clamp(min=_MASKED)
    y = z_c - m_c[:, None]
    u = y - x
    a, b = x.exp(), y.exp()
    terms = torch.where(u.abs() < 0.5, a * _phi_series(u), b - a - a * u)
    # Where a underflows and u is +large, b − a − a·u is b − 0 − 0: nothing of the candidate's mass is lost.
    # 0 · inf, where neither side gives the token any probability, is NaN and compares false: it adds nothing.
    terms = torch.where(terms > 0, terms, 0.0)
    return a.sum(-1), b.sum(-1), terms.sum(-1), (a * x).sum(-1)


def _phi_series(u: Tensor) -> Tensor:
    """Taylor series of eᵘ − 1 − u; relative error below 1e-7 for |u| < 0.5."""
    return u * u * (1 / 2 + u * (1 / 6 + u * (1 / 24 + u * (1 / 120 + u * (1 / 720 + u * (1 / 5040 + u / 40320))))))


def _row_max(z: Tensor) -> tuple[Tensor, Tensor]:
    """Row maxima and the first index of each. NaN wins over every number, as the flags need it.

    The maximum of each tile is one plain read of the matrix; the index is looked for in the winning tile alone.
    """
    vocab_size = z.shape[1]
    whole = vocab_size // _TILE_COLUMNS * _TILE_COLUMNS
    tiles = z[:, :whole].reshape(len(z), whole // _TILE_COLUMNS, _TILE_COLUMNS).amax(-1)
    if whole < vocab_size:
        tiles = torch.cat([tiles, z[:, whole:].amax(-1, keepdim=True)], -1)
    values, tile = tiles.max(-1)
    columns = tile[:, None] * _TILE_COLUMNS + torch.arange(_TILE_COLUMNS, device=z.device)
    columns.clamp_(max=vocab_size - 1)
    within = z.gather(1, columns).argmax(-1, keepdim=True)
    return values, columns.gather(1, within).squeeze(1)


def _nll(z: Tensor, m: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    return weight.log() - (z.gather(1, index).squeeze(1).double() - m.double())


def concatenate(parts: list[Divergence]) -> Divergence:
    """Join figures of consecutive positions."""
    return Divergence(
        **{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Divergence)}
    )
