"""The experts that vLLM routes tokens to.

vLLM runs a model's layers in `execute_model`. The log-probs of prompts and the sampled tokens, where the hook takes its
rows, come in later calls. So the routers are watched in the first, and what they chose is kept until then.

A router reports what it chose to its `capture_fn`, before load balancing turns ids into places. vLLM sets that itself
if it was started with `--enable-return-routed-experts`; both then get the ids. Nothing calls it if a kernel chooses
experts itself, in code compiled without it, and when a CUDA graph replays. There only that flag tells the experts, in
the server's answers.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from pytest_kld.hook.experts import (
    ExpertWatch,
    RoutingDescription,
    experts_of,
    experts_per_token_of,
    layers_of,
)

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_kld.hook.experts import Hook, Keep

_LAYERS = frozenset({"MoERunner", "FusedMoE"})
"""The classes of layers with experts: `FusedMoE` in 0.23, `MoERunner` since."""
_FLAG = "--enable-return-routed-experts"


class PassExperts:
    """What the routers of a runner's model chose in the last pass of ours. Only `seen` and `of_last_tokens` raise."""

    def __init__(self, runner: Any) -> None:
        """Take over the runner, whose model is not loaded yet."""
        self._runner = runner
        self._routers: list[Any] | None = None
        self._watch: ExpertWatch | None = None
        self._tokens: dict[str, int] = {}
        self._failure = ""

    @contextmanager
    def watching(self, tokens: Mapping[str, int], *, ours: bool) -> Iterator[None]:
        """Watch the routers while the layers of a pass run.

        Args:
            tokens: how many tokens of each request the pass runs.
            ours: whether one of these requests is ours; else the pass is left alone.

        """
        self._forget()
        if ours:
            try:
                self._attach(dict(tokens))
            except Exception:  # the server must keep running; `seen` reports it
                self._failure = traceback.format_exc()
        try:
            yield
        finally:
            if self._watch is not None:
                self._watch.stop()

    def seen(self, tokens: Mapping[str, int]) -> ExpertWatch | None:
        """Return the watch of the pass with these tokens of each request; None if nothing was watched.

        Raises:
            RuntimeError: the routers could not be watched.

        """
        if self._failure:
            raise RuntimeError(self._failure)
        return self._watch if self._tokens == dict(tokens) else None

    def of_last_tokens(self, tokens: Mapping[str, int]) -> Tensor | None:
        """Return the experts [requests, layers, K] of the last token that each request ran; None if they are unknown.

        Args:
            tokens: how many tokens of each request the pass ran, in the order of its rows.

        Raises:
            RuntimeError: the routers could not be watched.

        """
        watch, total = self.seen(tokens), sum(tokens.values())
        routes = None if watch is None else watch.routes(slice(0, total), total)
        return None if routes is None else routes[[end - 1 for end in accumulate(tokens.values())]]

    def _attach(self, tokens: dict[str, int]) -> None:
        if self._routers is None:
            routing = describe_routing(self._runner)
            known = routing is not None and routing.unobserved is None
            routers = list(_routers(self._runner.get_model()).values()) if known else []
            self._routers = routers if all(hasattr(router, "capture_fn") for router in routers) else []
        if self._routers:
            self._tokens = tokens
            self._watch = ExpertWatch(self._routers, partial(_put_hook, sum(tokens.values())))
            self._watch.attach()

    def _forget(self) -> None:
        if self._watch is not None:
            self._watch.detach()
        self._watch, self._tokens, self._failure = None, {}, ""


def describe_routing(runner: Any) -> RoutingDescription | None:
    """Describe how a runner's model routes tokens to experts; None for a dense model."""
    config = runner.vllm_config
    text = config.model_config.hf_text_config
    if (experts := experts_of(text)) is None:
        return None
    model = runner.get_model()
    routers = _routers(model)
    return RoutingDescription(
        layers=layers_of(routers),
        experts=experts,
        per_token=experts_per_token_of(text),
        unobserved=_why_unobserved(config, model, routers),
    )


def _why_unobserved(config: Any, model: Any, routers: Mapping[str, Any]) -> str | None:
    kinds = [type(router).__name__ for router in routers.values()]
    if not routers:
        return f"no layer of {type(model).__name__} has a router that vLLM can record"
    if getattr(config.parallel_config, "enable_eplb", False):
        return "experts are moved between ranks (expert-parallel load balancing), and no test has shown their ids right"
    if "ZeroExpertRouter" in kinds:
        return "tokens may be routed to experts that do nothing, whose ids vLLM replaces"
    if any(getattr(router, "num_fused_shared_experts", 0) for router in routers.values()):
        return "experts that every token uses are among those that the router chooses"
    hidden = [name for name, router in routers.items() if not hasattr(router, "capture_fn")]
    hidden += [name for name, layer in _layers(model).items() if _chooses_in_kernel(layer)]
    if hidden and not _flag_given(config):
        return f"kernels choose the experts of some layers ({hidden[0]}): {_FLAG} lets the server tell them"
    return None


def _flag_given(config: Any) -> bool:
    """Tell whether the server's answers have experts. The flag is in another section before 0.31."""
    return bool(
        getattr(getattr(config, "aux_output_config", None), "enable_return_routed_experts", False)
        or getattr(config.model_config, "enable_return_routed_experts", False)
    )


def _layers(model: Any) -> dict[str, Any]:
    """Return the layers with experts, by name; some models' own report their choices as routers do."""
    return {
        name: module
        for name, module in model.named_modules()
        if _LAYERS & {cls.__name__ for cls in type(module).__mro__} or _is_router(module)
    }


def _is_router(module: Any) -> bool:
    return hasattr(module, "capture_fn") and hasattr(module, "layer_id")


def _routers(model: Any) -> dict[str, Any]:
    """Return the routers by the names of their layers, each once, in the order of the layers."""
    found = {name: layer if _is_router(layer) else layer.router for name, layer in _layers(model).items()}
    once = {id(router): name for name, router in reversed(found.items())}
    return {name: router for name, router in found.items() if once[id(router)] == name}


def _chooses_in_kernel(layer: Any) -> bool:
    method = getattr(layer, "_quant_method", None) or getattr(layer, "quant_method", None)
    return bool(getattr(method, "is_monolithic", False))


@dataclass(frozen=True, slots=True)
class _Restore:
    """Gives a router back the `capture_fn` that it had."""

    router: Any
    before: Any

    def remove(self) -> None:
        self.router.capture_fn = self.before


def _put_hook(tokens: int, router: Any, keep: Keep) -> Hook:
    """Report what a router chooses for a pass's tokens; the rows after them, which fill up a graph, are left out."""
    before = router.capture_fn

    def capture(ids: Tensor) -> None:
        if before is not None:
            before(ids)
        keep(ids[:tokens] if len(ids) >= tokens else None)

    router.capture_fn = capture
    return _Restore(router, before)
