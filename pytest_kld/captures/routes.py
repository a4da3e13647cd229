"""The experts that a mixture-of-experts model routed each position to, as a capture keeps them.

    experts.safetensors          tokens [L, E] int64: how many positions of all windows went to each expert
    windows/00000.safetensors    experts [N, L, K]: the K experts of each position in each layer, in ascending order;
                                 uint8 if a layer has at most 256 experts, else int16 or int32

L layers, E experts, K experts per token, N positions. A position takes L·K bytes (twice that above 256 experts): 768 in
a model of 48 layers with 128 experts, 8 per token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pytest_kld.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pytest_kld.engines import LoadedModel, ModelFacts, Routing

EXPERTS = "experts"
"""The name of the routes in a window's file."""
TOKENS = "tokens"


def routes_dtype(experts: int) -> torch.dtype:
    """Return the smallest dtype for the ids of this many experts."""
    return torch.uint8 if experts <= 256 else torch.int16 if experts <= 1 << 15 else torch.int32


def checked_routes(routes: Tensor, routing: Routing, positions: int, where: str) -> Tensor:
    """Return the routes of a window as they are stored.

    Args:
        routes: [N, L, K], ids in any order.
        routing: the model's layers and experts.
        positions: N, the number of positions that the window must have.
        where: model and window, for messages.

    Raises:
        CaptureError: positions or layers are missing, or an id is not that of an expert, or occurs twice.

    """
    if routes.dim() != 3 or tuple(routes.shape[:2]) != (positions, len(routing.layers)):
        raise CaptureError(
            f"{where}: the engine told the experts of {tuple(routes.shape)} (positions, layers, experts per token), "
            f"expected {positions} positions and {len(routing.layers)} layers"
        )
    ordered = routes.to(torch.int32).sort(-1).values
    if ordered.numel() and not 0 <= int(ordered.min()) <= int(ordered.max()) < routing.experts:
        raise CaptureError(
            f"{where}: the engine told experts {int(ordered.min())} to {int(ordered.max())}, and a layer has "
            f"{routing.experts}"
        )
    if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
        raise CaptureError(f"{where}: the engine told the same expert twice for one position")
    return ordered.to(routes_dtype(routing.experts))


def count_tokens(routes: Tensor, experts: int) -> Tensor:
    """Return how many positions went to each expert of each layer: [L, E] int64, from routes [N, L, K]."""
    layers = routes.shape[1]
    places = routes.long() + torch.arange(layers)[None, :, None] * experts
    return torch.bincount(places.flatten(), minlength=layers * experts).reshape(layers, experts)


def total_tokens(windows: Sequence[Path], routing: Routing, positions: int, label: str) -> Tensor:
    """Add up the counts of all windows.

    Args:
        windows: the windows' files.
        routing: the model's layers and experts.
        positions: the number of positions in all windows.
        label: the model's name, for messages.

    Returns:
        [L, E], int64. Each layer adds up to positions × K.

    Raises:
        CaptureError: a layer does not, so tokens were missed, or a file cannot be read.

    """
    total, width = torch.zeros(len(routing.layers), routing.experts, dtype=torch.int64), 0
    for path in windows:
        try:
            with safe_open(path, framework="pt") as file:
                routes = file.get_tensor(EXPERTS)
        except (OSError, SafetensorError) as error:
            raise CaptureError(f"cannot read {path}: {error}") from error
        total += count_tokens(routes, routing.experts)
        width = routes.shape[2]
    for layer, tokens in zip(routing.layers, total.sum(1).tolist(), strict=True):
        if tokens != positions * width:
            raise CaptureError(
                f"{label}: the experts of layer {layer} got {tokens:,} tokens in all, expected {positions * width:,}: "
                f"{positions:,} positions times {width} experts per token"
            )
    return total


def observed(loaded: LoadedModel) -> Routing | None:
    """Return a model's routing if the experts of each token are recorded; None if it is dense or does not tell them."""
    return loaded.routing if loaded.routing is not None and loaded.routing.unobserved is None else None


def route_bytes(facts: ModelFacts) -> int:
    """Return the bytes that a position's experts take at most: those of a model all of whose layers have experts."""
    if facts.experts is None:
        return 0
    return (facts.layers or 0) * (facts.experts_per_token or 0) * routes_dtype(facts.experts).itemsize
