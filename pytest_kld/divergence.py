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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

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
_ONE_LOOP: dict[str, str | int | bool | Callable[..., Any]] = {
    "cpp.enable_floating_point_contract_flag": "fast",  # fused multiply-add
    # The compiler would write what several sums share to memory and read it again.
    "realize_opcount_threshold": 10_000,
    "realize_reads_threshold": 10_000,
}
_SCALE_EXPONENT = 24
"""The compiled pass scales by 2²⁴, so that its least weight is float32's least number, without denormal numbers."""
_LEAST_EXPONENT = -127 - _SCALE_EXPONENT
"""The exponent whose bits are those of 0."""
_LEAST_LOG = -105.0
"""Its exponent of two rounds to _LEAST_EXPONENT: the weight is 0."""
_LEAST_LOG_RATIO = -2000.0
"""The compiled pass takes the exponential of any smaller log ratio as 0."""
_LN_2_HIGH = 355 / 512
"""The leading bits of ln 2: its product with an exponent is exact (Cody and Waite)."""
_LN_2_LOW = math.log(2) - _LN_2_HIGH
_TILE_COLUMNS = 2048
"""Columns whose maximum and, compiled, sums are taken at once: float32 sums of whole rows would be off by 1e-5."""

Sums = tuple[Tensor, Tensor, Tensor, Tensor]


class Reduced(NamedTuple):
    """What is left of the rows of both sides; every field has shape [N].

    Attributes:
        max_r: m of the reference; NaN where the row holds one.
        max_c: m of the candidate.
        argmax_r: the first column that has it, int64.
        argmax_c: the same of the candidate.
        sums: Σ a, Σ b, Σ a φ(u) and Σ a log a.

    """

    max_r: Tensor
    max_c: Tensor
    argmax_r: Tensor
    argmax_c: Tensor
    sums: Sums


Reduction = Callable[[Tensor, Tensor], Reduced]


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
    m_r, m_c, argmax_r, argmax_c, sums = (reduction or eager_reduction)(z_r, z_c)
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


def eager_reduction(z_r: Tensor, z_c: Tensor) -> Reduced:
    """Reduce each row with plain torch operations in one reused workspace.

    Args:
        z_r: [N, V] logits of the reference, float32 or float64.
        z_c: [N, V] logits of the candidate, same dtype and device.

    """
    (m_r, argmax_r), (m_c, argmax_c) = (_row_max(z, _tile_max(z)) for z in (z_r, z_c))
    return Reduced(m_r, m_c, argmax_r, argmax_c, _eager_sums(z_r, z_c, m_r, m_c))


def _eager_sums(z_r: Tensor, z_c: Tensor, m_r: Tensor, m_c: Tensor) -> Sums:
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

    Compiling takes some 20 seconds for each width, and a C++ compiler (on CUDA: Triton), so it pays for large jobs
    only. It is written for float32; float64 is reduced by `eager_reduction`.
    """
    from torch._dynamo import mark_dynamic, mark_static  # loads the compiler, which takes a second

    with warnings.catch_warnings(action="ignore"):  # torch's compiler uses what torch deprecates
        one_pass = torch.compile(_one_pass, options=_ONE_LOOP)

    def reduction(z_r: Tensor, z_c: Tensor) -> Reduced:
        if z_r.dtype != torch.float32 or len(z_r) < 2:  # one row would be compiled apart
            return eager_reduction(z_r, z_c)
        whole = z_r.shape[1] - z_r.shape[1] % min(_TILE_COLUMNS, z_r.shape[1])
        # An empty row of −inf would do for a whole number of tiles, but amax refuses it.
        rest_r, rest_c = (functional.pad(z[:, whole:], (0, 1), value=-math.inf).amax(-1) for z in (z_r, z_c))
        arguments = z_r[:, :whole], z_c[:, :whole], rest_r, rest_c
        for tensor in arguments:
            mark_dynamic(tensor, 0)  # compiled once for any number of rows, and for each width apart
        for matrix in arguments[:2]:
            mark_static(matrix, 1)
        tiles_r, tiles_c, *parts = one_pass(*arguments)
        m_r, argmax_r = _row_max(z_r, torch.cat([tiles_r, rest_r[:, None]], -1))
        m_c, argmax_c = _row_max(z_c, torch.cat([tiles_c, rest_c[:, None]], -1))
        sums = torch.stack(parts).double().sum(-1) / 2**_SCALE_EXPONENT
        if whole < z_r.shape[1]:
            sums += torch.stack(_eager_sums(z_r[:, whole:], z_c[:, whole:], m_r, m_c))
        apart = ~(m_r.isfinite() & m_c.isfinite())  # the pass computes b from a: one bad side would spoil both
        if apart.any():
            sums[:, apart] = torch.stack(_eager_sums(z_r[apart], z_c[apart], m_r[apart], m_c[apart])).double()
        first, second, third, fourth = sums
        return Reduced(m_r, m_c, argmax_r, argmax_c, (first, second, third, fourth))

    return reduction


def _one_pass(z_r: Tensor, z_c: Tensor, rest_r: Tensor, rest_c: Tensor) -> tuple[Tensor, ...]:
    """Take maxima and sums of every tile, relative to the row's maximum.

    The sums are those of `_eager_sums` times 2**_SCALE_EXPONENT, where weights below 2⁻¹⁵⁰ are 0.

    exp is written out: with k = round(v / ln 2) and the rest t = v − k ln 2, eᵛ = 2ᵏ (1 + t + φ(t)). One polynomial
    then serves both φ(u) where k = 0 and b = a eᵘ, whose exponents are added before either can over- or underflow.

    Args:
        z_r: [N, K·T] logits of the reference, float32.
        z_c: [N, K·T] logits of the candidate.
        rest_r: [N] maxima of the columns that are reduced elsewhere, −inf without any.
        rest_c: the same of the candidate.

    Returns:
        Maxima of the tiles of both sides and the four sums, each [N, K].

    """
    z_r, z_c = (z.reshape(len(z), -1, min(_TILE_COLUMNS, z.shape[1])) for z in (z_r, z_c))
    tiles_r, tiles_c = z_r.amax(-1), z_c.amax(-1)
    m_r, m_c = torch.maximum(tiles_r.amax(-1), rest_r), torch.maximum(tiles_c.amax(-1), rest_c)
    x = (z_r - m_r[:, None, None]).clamp(min=_LEAST_LOG)
    u = z_c - m_c[:, None, None] - x
    k, t, phi = _split_exp(x)
    k_u, t_u, phi_u = _split_exp(u.clamp(min=_LEAST_LOG_RATIO))
    mantissa = 1 + t + phi
    a = mantissa * _power_of_two(k)
    b = mantissa * (1 + t_u + phi_u) * _power_of_two((k + k_u).clamp(min=_LEAST_EXPONENT))
    terms = torch.where(k_u == 0, a * phi_u, b - a - a * u)
    # 0 · inf, where neither side gives the token any probability, is NaN and compares false: it adds nothing.
    terms = torch.where(terms > 0, terms, 0.0)
    return tiles_r, tiles_c, a.sum(-1), b.sum(-1), terms.sum(-1), (a * x).sum(-1)


def _split_exp(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return k, t, φ(t) with eᵛ = 2ᵏ (1 + t + φ(t)) and |t| ≤ ln 2 / 2; φ by its Taylor series, to 1e-7 of itself."""
    k = (v * (1 / math.log(2))).round()
    t = v - k * _LN_2_HIGH - k * _LN_2_LOW
    return k, t, t * t * (1 / 2 + t * (1 / 6 + t * (1 / 24 + t * (1 / 120 + t * (1 / 720 + t * (1 / 5040))))))


def _power_of_two(exponent: Tensor) -> Tensor:
    """Return 2**(exponent + _SCALE_EXPONENT) from the bits of a float32; 0 for _LEAST_EXPONENT."""
    return ((exponent.to(torch.int32) + (127 + _SCALE_EXPONENT)) << 23).view(torch.float32)


def _tile_max(z: Tensor) -> Tensor:
    """Return the maxima of each tile and of what is left, [N, ⌈V / T⌉]: one plain read of the matrix."""
    whole = z.shape[1] - z.shape[1] % _TILE_COLUMNS
    tiles = z[:, :whole].reshape(len(z), whole // _TILE_COLUMNS, _TILE_COLUMNS).amax(-1)
    return torch.cat([tiles, z[:, whole:].amax(-1, keepdim=True)], -1) if whole < z.shape[1] else tiles


def _row_max(z: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Row maxima and the first index of each, looked for in the winning tile alone. NaN wins over every number."""
    values, tile = tiles.max(-1)
    columns = tile[:, None] * _TILE_COLUMNS + torch.arange(_TILE_COLUMNS, device=z.device)
    columns.clamp_(max=z.shape[1] - 1)
    within = z.gather(1, columns).argmax(-1, keepdim=True)
    return values, columns.gather(1, within).squeeze(1)


def _nll(z: Tensor, m: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    return weight.log() - (z.gather(1, index).squeeze(1).double() - m.double())


def concatenate(parts: list[Divergence]) -> Divergence:
    """Join figures of consecutive positions."""
    return Divergence(
        **{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Divergence)}
    )
