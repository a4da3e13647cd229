"""The language-model head: it turns hidden states into logits, and a check proves that the engine does the same."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from pytest_kld.kernel.divergence import divergence
from pytest_kld.kernel.precision import full_float32

HeadMode = Literal["exact", "native"]
_TILE_ELEMENTS = 1 << 24
"""Weight elements converted to float32 at a time on devices without a mixed-precision product."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """`logits = softcap(scale · (hidden @ weightᵀ + bias))`.

    Attributes:
        weight: [V, H], in the model's dtype.
        bias: [V] or None.
        scale: factor on the product (Cohere's `logit_scale`, the inverse of Granite's `logits_scaling`).
        softcap: c in c · tanh(z / c) (Gemma 2's `final_logit_softcapping`), or None.

    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab_size(self) -> int:
        """Return V."""
        return int(self.weight.shape[0])

    def trim(self, vocab_size: int) -> Head:
        """Cut padding rows, so that V is the model's vocabulary."""
        bias = None if self.bias is None else self.bias[:vocab_size]
        return replace(self, weight=self.weight[:vocab_size], bias=bias)

    def to(self, device: torch.device) -> Head:
        """Move the tensors to a device."""
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, weight=self.weight.to(device), bias=bias)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, as they are saved."""
        return {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})

    def transforms(self) -> dict[str, float | None]:
        """Return the transforms applied to the product, as JSON for the manifest."""
        return {"scale": self.scale, "softcap": self.softcap}

    def logits(self, hidden: Tensor, mode: HeadMode = "exact") -> Tensor:
        """Compute logits.

        Args:
            hidden: [N, H] last hidden states, in the engine's dtype.
            mode: `exact` computes in float32 (float64 for a float64 model); `native` computes in the engine's dtype,
                with the same rounding as the engine. Neither uses TF32 for float32 products.

        Returns:
            [N, V]; float32 (or float64) for `exact`, the engine's dtype for `native`.

        """
        if mode == "native":
            weight, bias = self.weight.to(hidden.dtype), self.bias
            with full_float32():
                z = functional.linear(hidden, weight, None if bias is None else bias.to(hidden.dtype))
        else:
            z = _exact_product(hidden, self.weight)
            if self.bias is not None:
                z += self.bias
        if self.scale != 1.0:
            z *= self.scale
        if self.softcap is not None:
            z = z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z


def _exact_product(hidden: Tensor, weight: Tensor) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    with full_float32():
        if hidden.dtype == weight.dtype == dtype:
            return torch.mm(hidden, weight.T)
        if _has_mixed_product(hidden) and hidden.dtype == weight.dtype and dtype == torch.float32:
            try:
                # Tensor cores multiply 16-bit numbers exactly and add them up in float32.
                return torch.mm(hidden, weight.T, out_dtype=torch.float32)
            except torch.OutOfMemoryError:
                raise
            except (TypeError, RuntimeError, NotImplementedError):  # no such argument, or not for this device or dtype
                pass
        return _tiled_product(hidden.to(dtype), weight)


def _has_mixed_product(hidden: Tensor) -> bool:
    """Tell whether the device may multiply 16-bit numbers into float32. On a CPU, torch has no such product."""
    return hidden.is_cuda


def _tiled_product(hidden: Tensor, weight: Tensor) -> Tensor:
    """Multiply in the dtype of `hidden`, converting one part of the weight at a time."""
    dtype = hidden.dtype
    z = torch.empty(hidden.shape[0], weight.shape[0], dtype=dtype, device=hidden.device)
    tile = max(1, _TILE_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], tile):
        torch.mm(hidden, weight[start : start + tile].to(dtype).T, out=z[:, start : start + tile])
    return z


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadCheck:
    """How well recomputed logits agree with the engine's own.

    Attributes:
        rows: finite rows compared.
        worst: largest |difference| in units of the tolerance; the head is faithful if it is at most 1.
        mean_kl: mean KL(recomputed ‖ engine's) in nats. If the head is faithful, this is the engine's own rounding.
        dtype: the dtype whose rounding the tolerance allows for, e.g. `bfloat16`.

    """

    rows: int
    worst: float
    mean_kl: float
    dtype: str

    @property
    def faithful(self) -> bool:
        """Whether the head explains the engine's logits. It counts as faithful if no row is finite."""
        return self.worst <= 1

    def to_json(self) -> dict[str, Any]:
        """Return the figures for the manifest."""
        return {"rows": self.rows, "worst": self.worst, "mean_kl_nats": self.mean_kl, "tolerance_dtype": self.dtype}


def check_head(head: Head, hidden: Tensor, engine_logits: Tensor) -> HeadCheck:
    """Recompute rows and compare them with the engine's own logits.

    The engine rounds its product, and each step after it, to its dtype: up to 2 ε |z| for a logit z. ε belongs to the
    dtype of hidden states or weight, even if the logits have a wider one: a softcap is often applied in float32 to a
    product in bfloat16. A softcap never increases an error: its slope is at most 1, and |z| sech²(z / c) is at most the
    size of its result. Adding H products up costs at most about ε ‖h‖ ‖w‖ / √H more if partial sums are rounded to that
    dtype, and 4 √H ε₃₂ ‖h‖ ‖w‖ / √H if they are float32. Each logit may differ by the sum of these errors; a quantized,
    LoRA-wrapped or otherwise different head differs by more.

    Args:
        head: the head to check.
        hidden: [K, H].
        engine_logits: [K, V], for the same rows, in the engine's dtype or a wider one.

    """
    dtype = str(engine_logits.dtype).removeprefix("torch.")
    finite = hidden.isfinite().all(-1)
    if not torch.equal(finite, engine_logits.isfinite().all(-1)):
        return HeadCheck(rows=int(finite.sum()), worst=math.inf, mean_kl=math.inf, dtype=dtype)
    if not finite.any():
        return HeadCheck(rows=0, worst=0.0, mean_kl=0.0, dtype=dtype)
    hidden, engine_logits = hidden[finite], engine_logits[finite]
    exact = head.logits(hidden)
    width = math.sqrt(hidden.shape[1])
    eps = max(torch.finfo(tensor.dtype).eps for tensor in (hidden, head.weight, engine_logits))
    norms = hidden.to(exact.dtype).norm(dim=-1)[:, None] * torch.linalg.vector_norm(
        head.weight, dim=-1, dtype=exact.dtype
    )
    accumulated = max(eps, 4 * width * torch.finfo(exact.dtype).eps) * norms * abs(head.scale) / width
    tolerance = 2 * eps * exact.abs() + accumulated
    difference = (exact - engine_logits.to(exact.dtype)).abs()
    worst = torch.where(difference == 0, 0.0, difference / tolerance).nan_to_num(nan=math.inf, posinf=math.inf).max()
    figures = divergence(exact, engine_logits, torch.full((len(exact),), -1, device=exact.device))
    return HeadCheck(rows=len(exact), worst=float(worst), mean_kl=float(figures.kl.mean()), dtype=dtype)
