"""Watching inside a server which experts a model routes each token to.

The seams name the routers, which are what chooses experts. Hooks on them see what each of them chose during a pass of
ours; they are removed when it ends, so other passes cost nothing. A CUDA graph that replays runs no hooks, and then a
pass shows no experts: that is told, and never counted as none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch import nn

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)(?:\.|$)")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_top_k", "moe_topk", "moe_k", "top_k_experts", "top_k")
"""The fields' names in the configs of transformers' families."""

IdsOf = Callable[["nn.Module", Any], "Tensor | None"]
"""Takes a module and its output, and returns [tokens, K] ids of routed experts; None if the output does not tell."""
Keep = Callable[["Tensor | None"], None]
"""Takes what a router chose for the tokens of a pass, as `IdsOf` returns it."""


class Hook(Protocol):
    """A hook on a router."""

    def remove(self) -> None:
        """Take it off."""


PutHook = Callable[[Any, Keep], Hook]
"""Puts a hook on a router, which reports each of its choices."""


def experts_of(config: Any) -> int | None:
    """Return how many routed experts a layer has according to a text model's config; None for a dense model."""
    return _first(config, _EXPERTS)


def experts_per_token_of(config: Any) -> int | None:
    """Return to how many experts a layer routes a token; None for a dense model."""
    return None if experts_of(config) is None else _first(config, _EXPERTS_PER_TOKEN)


def _first(config: Any, names: Sequence[str]) -> int | None:
    for part in (config, getattr(config, "ffn_config", None)):
        values = (getattr(part, name, None) for name in names)
        if (found := next((value for value in values if isinstance(value, int) and value > 0), None)) is not None:
            return found
    return None


def layers_of(names: Iterable[str]) -> tuple[int, ...]:
    """Return the numbers of the layers that modules belong to, from the modules' names; else count from 0."""
    names = list(names)
    numbers = [int(match[1]) if (match := _LAYER.search(name)) else None for name in names]
    known = [number for number in numbers if number is not None]
    return tuple(known) if len(set(known)) == len(names) else tuple(range(len(names)))


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingDescription:
    """The layers of a model that route tokens to experts.

    Attributes:
        layers: their numbers.
        experts: the number of routed experts in each.
        per_token: how many of them each token uses; None if that is unknown.
        unobserved: why the experts of each token cannot be told, in a clause; None if they can, as far as is known
            before a window runs.

    """

    layers: tuple[int, ...]
    experts: int
    per_token: int | None = None
    unobserved: str | None = None


def on_outputs(ids_of: IdsOf) -> PutHook:
    """Return what puts hooks on routers that are modules and return their choices.

    Args:
        ids_of: reads their outputs.

    """

    def put(module: nn.Module, keep: Keep) -> Hook:
        return module.register_forward_hook(lambda module, _, output: keep(ids_of(module, output)))

    return put


class ExpertWatch:
    """Hooks on the routers of one model, for one pass."""

    def __init__(self, routers: Sequence[Any], put_hook: PutHook) -> None:
        """Prepare; `attach` puts the hooks in.

        Args:
            routers: those of the layers with experts, in the order of the layers.
            put_hook: puts a hook on one of them.

        """
        self._routers, self._put_hook = routers, put_hook
        self._seen: list[list[Tensor | None]] = [[] for _ in routers]
        self._hooks: list[Hook] = []

    def attach(self) -> None:
        """Put the hooks in, and forget what they saw before."""
        self.detach()
        for seen, router in zip(self._seen, self._routers, strict=True):
            self._hooks.append(self._put_hook(router, self._keep(seen)))

    def stop(self) -> None:
        """Remove the hooks, and keep what they saw until `detach`."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def detach(self) -> None:
        """Remove the hooks and forget the pass."""
        self.stop()
        for seen in self._seen:
            seen.clear()

    def routes(self, tokens: slice, of: int) -> Tensor | None:
        """Return the experts [tokens, layers, K] of a part of the pass's tokens; None if the pass does not tell them.

        Args:
            tokens: which.
            of: the number of tokens that the pass ran.

        """
        found = [seen[0] if len(seen) == 1 else None for seen in self._seen]
        layers = [ids for ids in found if ids is not None and ids.dim() == 2 and len(ids) == of]
        if not layers or len(layers) < len(self._seen) or len({ids.shape[1] for ids in layers}) > 1:
            return None
        return torch.stack([ids[tokens] for ids in layers], dim=1)

    def _keep(self, seen: list[Tensor | None]) -> Keep:
        def keep(ids: Tensor | None) -> None:
            # Kernels may reuse the memory of ids, so they are copied.
            seen.append(None if ids is None else ids.to(torch.int32, copy=True))

        return keep
