"""Reduces whole rows for the kernel: maxima, arg-maxima and four sums of both sides. Pure torch, no I/O.

The symbols are those of `divergence`. Two implementations compute the same result: plain operations for any device and
dtype, and a compiled loop.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

_MASKED = -1e30
"""Stands in for −inf on the reference's side, so that 0 · (−inf) cannot arise there."""
_CACHED_ELEMENTS = 1 << 20
"""Logits per side in one eager block on a CPU: they fit into the core's caches."""
_DEVICE_ELEMENTS = 1 << 26
"""Logits per side in one eager block on an accelerator: few launches, bounded workspace (1 GiB)."""
_ONE_LOOP: dict[str, str | int | bool | Callable[..., Any]] = {
    "cpp.enable_floating_point_contract_flag": "fast",  # fused multiply-add
    # Otherwise the compiler would write values that several sums share to memory and read them again.
    "realize_opcount_threshold": 10_000,
    "realize_reads_threshold": 10_000,
}
_SCALE_EXPONENT = 24
"""The compiled pass scales by 2²⁴, so that its smallest weight is float32's smallest number, without denormals."""
_LEAST_EXPONENT = -127 - _SCALE_EXPONENT
"""The exponent whose bits are those of 0."""
_LEAST_LOG = -105.0
"""The exponent of two of this logarithm rounds to _LEAST_EXPONENT: the weight is 0."""
_LEAST_LOG_RATIO = -2000.0
"""The compiled pass treats the exponential of any smaller log ratio as 0."""
_LN_2_HIGH = 355 / 512
"""The leading bits of ln 2: its product with an exponent is exact (Cody and Waite)."""
_LN_2_LOW = math.log(2) - _LN_2_HIGH
_TILE_COLUMNS = 2048
"""Columns per maximum and, in the compiled pass, per sum: float32 sums of whole rows would be off by 1e-5."""

Sums = tuple[Tensor, Tensor, Tensor, Tensor]


class Reduced(NamedTuple):
    """The reduced rows of both sides; every field has shape [N].

    Attributes:
        max_r: m of the reference; NaN if the row contains NaN.
        max_c: m of the candidate; likewise.
        argmax_r: the first column with the value max_r, int64.
        argmax_c: the first column with the value max_c, int64.
        sums: Σ a, Σ b, Σ a φ(u) and Σ a log a.

    """

    max_r: Tensor
    max_c: Tensor
    argmax_r: Tensor
    argmax_c: Tensor
    sums: Sums


Reduction = Callable[[Tensor, Tensor], Reduced]


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
    # Page faults of new temporaries of this size would cost more than the arithmetic.
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
        torch.where(u > 60, y, x, out=x)  # a eᵘ = b, and a (1 + u) is negligible: exact even if eᵘ overflows
        x.nan_to_num_(nan=0.0, posinf=math.inf)  # 0 · inf: both sides give the token probability 0
        torch.sum(x, -1, out=sums[2][block])
    return sums[0], sums[1], sums[2], sums[3]


def compiled_reduction() -> Reduction:
    """Compile the same sums into one pass over both matrices (`torch.compile`).

    Compiling takes about 20 seconds for each width and needs a C++ compiler (on CUDA: Triton), so it pays off for large
    jobs only. The pass is written for float32; `eager_reduction` handles float64.
    """
    from torch._dynamo import mark_dynamic, mark_static  # loads the compiler, which takes a second

    with warnings.catch_warnings(action="ignore"):  # torch's compiler uses deprecated parts of torch
        one_pass = torch.compile(_one_pass, options=_ONE_LOOP)

    def reduction(z_r: Tensor, z_c: Tensor) -> Reduced:
        if z_r.dtype != torch.float32 or len(z_r) < 2:  # a single row would be compiled separately
            return eager_reduction(z_r, z_c)
        whole = z_r.shape[1] - z_r.shape[1] % min(_TILE_COLUMNS, z_r.shape[1])
        # Without the padding the rest would be empty for a whole number of tiles, which amax rejects.
        rest_r, rest_c = (functional.pad(z[:, whole:], (0, 1), value=-math.inf).amax(-1) for z in (z_r, z_c))
        arguments = z_r[:, :whole], z_c[:, :whole], rest_r, rest_c
        for tensor in arguments:
            mark_dynamic(tensor, 0)  # compiled once for any number of rows, but separately for each width
        for matrix in arguments[:2]:
            mark_static(matrix, 1)
        tiles_r, tiles_c, *parts = one_pass(*arguments)
        m_r, argmax_r = _row_max(z_r, torch.cat([tiles_r, rest_r[:, None]], -1))
        m_c, argmax_c = _row_max(z_c, torch.cat([tiles_c, rest_c[:, None]], -1))
        sums = torch.stack(parts).double().sum(-1) / 2**_SCALE_EXPONENT
        if whole < z_r.shape[1]:
            sums += torch.stack(_eager_sums(z_r[:, whole:], z_c[:, whole:], m_r, m_c))
        apart = ~(m_r.isfinite() & m_c.isfinite())  # the pass computes b from a: one bad side would invalidate both
        if apart.any():
            sums[:, apart] = torch.stack(_eager_sums(z_r[apart], z_c[apart], m_r[apart], m_c[apart])).double()
        first, second, third, fourth = sums
        return Reduced(m_r, m_c, argmax_r, argmax_c, (first, second, third, fourth))

    return reduction


def _one_pass(z_r: Tensor, z_c: Tensor, rest_r: Tensor, rest_c: Tensor) -> tuple[Tensor, ...]:
    """Take maxima and sums of every tile, relative to the row's maximum.

    The sums are those of `_eager_sums` times 2**_SCALE_EXPONENT, except that weights below 2⁻¹⁵⁰ count as 0.

    exp is expanded: with k = round(v / ln 2) and the rest t = v − k ln 2, eᵛ = 2ᵏ (1 + t + φ(t)). One polynomial then
    serves both φ(u) if k = 0, and b = a eᵘ, whose exponents are added before either can overflow or underflow.

    Args:
        z_r: [N, K·T] logits of the reference, float32.
        z_c: [N, K·T] logits of the candidate.
        rest_r: [N] maxima of the reference's columns that are reduced elsewhere; −inf if there are none.
        rest_c: [N] the same for the candidate.

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
    # 0 · inf (both sides give the token probability 0) is NaN, which compares false: it adds nothing.
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
    """Return the maxima of each tile and of the remaining columns, [N, ⌈V / T⌉], in one plain read of the matrix."""
    whole = z.shape[1] - z.shape[1] % _TILE_COLUMNS
    tiles = z[:, :whole].reshape(len(z), whole // _TILE_COLUMNS, _TILE_COLUMNS).amax(-1)
    return torch.cat([tiles, z[:, whole:].amax(-1, keepdim=True)], -1) if whole < z.shape[1] else tiles


def _row_max(z: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Return row maxima and the first index of each, searched in the winning tile only. NaN beats every number."""
    values, tile = tiles.max(-1)
    columns = tile[:, None] * _TILE_COLUMNS + torch.arange(_TILE_COLUMNS, device=z.device)
    columns.clamp_(max=z.shape[1] - 1)
    within = z.gather(1, columns).argmax(-1, keepdim=True)
    return values, columns.gather(1, within).squeeze(1)
