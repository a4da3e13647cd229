"""Watching which experts a transformers model routes each token to.

In transformers 5 the layers of every mixture-of-experts family hand the experts' ids to one module that holds all
experts of the layer, as an argument of its `forward`. These ids are what was used, after every bias and group limit of
the router, so they are read there and not recomputed from router logits.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from pytest_kld.engines import Routing
from pytest_kld.errors import CaptureError
from pytest_kld.hook.experts import layers_of

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

_NAMES = ("top_k_index", "router_indices", "selected_experts", "topk_indices")
"""The argument's name in the families that transformers has."""


class RouteWatch:
    """Hooks on the experts of a model. It counts every layer or none."""

    def __init__(self, network: nn.Module, experts: int, label: str) -> None:
        """Find the experts.

        Args:
            network: the model.
            experts: how many experts a layer has, according to the config.
            label: the model's name for messages.

        """
        found: list[tuple[str, nn.Module, tuple[str, int]]] = []
        for name, module in network.named_modules():
            inside = found and name.startswith(f"{found[-1][0]}.")
            if not inside and (index := _argument(module)) is not None:
                found.append((name, module, index))
        self._modules = [(module, index) for _, module, index in found]
        self._label = label
        self._seen: list[list[Tensor]] = [[] for _ in found]
        self._taken = False
        missing = None if found else f"no module of {type(network).__name__} shows the ids of the experts that it uses"
        self.routing = Routing(layers=layers_of(name for name, _, _ in found), experts=experts, unobserved=missing)

    def attach(self) -> list[RemovableHandle]:
        """Put the hooks in; the caller removes them."""
        return [
            module.register_forward_pre_hook(_keep(self._seen[place], index), with_kwargs=True)
            for place, (module, index) in enumerate(self._modules)
        ]

    def clear(self) -> None:
        """Forget the last pass."""
        for seen in self._seen:
            seen.clear()

    def take(self, tokens: int) -> Tensor | None:
        """Return the experts [tokens, layers, experts per token] of the last pass; None if it does not show them all.

        Raises:
            CaptureError: this pass does not show all of them, but earlier ones did.

        """
        if self.routing.unobserved is not None:
            return None
        wrong = self._wrong(tokens)
        if wrong is None:
            self._taken = True
            narrow = torch.int16 if self.routing.experts <= torch.iinfo(torch.int16).max else torch.int32
            return torch.stack([seen[0].reshape(tokens, -1).to("cpu", narrow) for seen in self._seen], dim=1)
        if self._taken:
            raise CaptureError(f"{self._label}: {wrong}, though not in the first window")
        self.routing = replace(self.routing, unobserved=wrong)
        return None

    def _wrong(self, tokens: int) -> str | None:
        widths = set()
        for layer, seen in zip(self.routing.layers, self._seen, strict=True):
            if len(seen) != 1:
                return f"the experts of layer {layer} ran {len(seen)} times in one pass"
            if seen[0].dim() < 2 or seen[0].numel() != tokens * seen[0].shape[-1]:
                return f"the experts of layer {layer} got ids of shape {tuple(seen[0].shape)} for {tokens} tokens"
            widths.add(seen[0].shape[-1])
        return None if len(widths) == 1 else f"its layers use different numbers of experts: {sorted(widths)}"


def _argument(module: nn.Module) -> tuple[str, int] | None:
    """Return name and place of the argument of `forward` that holds the experts' ids; None if it has none."""
    parameters = list(inspect.signature(module.forward).parameters)
    name = next((name for name in _NAMES if name in parameters), None)
    return None if name is None else (name, parameters.index(name))


def _keep(seen: list[Tensor], index: tuple[str, int]) -> Any:
    name, place = index

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((kwargs[name] if name in kwargs else args[place]).detach())

    return before
