"""The head of a served model: its description, and a rank's part of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

_PLAIN_METHODS = {None, "UnquantizedEmbeddingMethod", "UnquantizedLinearMethod", "PackWeightMethod"}
"""Quantization methods that leave the head a plain product."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadDescription:
    """Description of the head.

    Attributes:
        plain: whether it is a plain product of the hidden states with a weight.
        kind: module and quantization method, in words.
        scale: factor on the product.
        softcap: c in c · tanh(z / c), or None.

    """

    plain: bool
    kind: str
    scale: float
    softcap: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadPart:
    """Rows of the head.

    Attributes:
        tensors: `weight` [stop - start, H] and, if there is one, `bias` [stop - start].
        start: the first row's token id.
        stop: the token id after the last row's.

    """

    tensors: dict[str, Tensor]
    start: int
    stop: int


def describe_head(head: Any, scale: float | None = None, softcap: float | None = None) -> HeadDescription:
    """Describe a module; one with a `quant_method` is plain only if that method leaves the product unchanged.

    Args:
        head: the module.
        scale: factor on its product, if any.
        softcap: softcap on its product, if any.

    """
    method = getattr(head, "quant_method", None)
    name = None if method is None else type(method).__name__
    weight = getattr(head, "weight", None)
    plain = name in _PLAIN_METHODS and isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point()
    return HeadDescription(
        plain=bool(plain and weight is not None and weight.dtype.itemsize > 1),
        kind=f"{type(head).__name__}, {name or 'no quantization method'}",
        scale=float(scale or 1.0),
        softcap=float(softcap) if softcap else None,
    )


def head_part(head: Any, rank: int) -> HeadPart | None:
    """Return this rank's rows of the head without padding.

    If a module's vocabulary is split, its `shard_indices` give the rows that it holds. If it is not split, only rank 0
    returns it.
    """
    shard = getattr(head, "shard_indices", None)
    if shard is None:
        if rank != 0:
            return None
        start, stop = 0, int(head.weight.shape[0])
    else:
        start, stop = int(shard.org_vocab_start_index), int(shard.org_vocab_end_index)
    tensors = {"weight": head.weight.detach()[: stop - start]}
    bias = getattr(head, "bias", None)
    if isinstance(bias, Tensor):
        tensors["bias"] = bias.detach()[: stop - start]
    return HeadPart(tensors=tensors, start=start, stop=stop)
