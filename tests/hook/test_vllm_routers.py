"""Watching vLLM's routers: what they tell of a pass, and of which models nothing is told. The models are made up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pytest_kld.hook.vllm_experts import PassExperts, describe_routing

PASS = {"cmpl-pytest-kld:run:0-0": 3, "other": 2}
IDS = torch.tensor([[1, 0], [2, 3], [4, 5], [6, 7], [0, 7]])


class Router:
    """Chooses what it is told, as vLLM's `BaseRouter` does; kernels may use the memory again."""

    def __init__(self, **attributes: Any) -> None:
        self.capture_fn = None
        self.__dict__.update(attributes)

    def select_experts(self, ids: torch.Tensor) -> None:
        ids = ids.clone()
        if self.capture_fn is not None:
            self.capture_fn(ids)
        ids.zero_()


class ZeroExpertRouter(Router):
    """One of a model with experts that do nothing."""


class KernelRouter:
    """One that vLLM cannot record."""


class MoERunner(nn.Module):
    """A layer with experts."""

    def __init__(self, router: Any, *, monolithic: bool = False) -> None:
        super().__init__()
        self.router, self._quant_method = router, SimpleNamespace(is_monolithic=monolithic)


class FusedMoE(MoERunner):
    """A layer of an older release, which holds another one with the same router."""

    def __init__(self, router: Any) -> None:
        super().__init__(router)
        self.runner = MoERunner(router)


class OwnMoE(nn.Module):
    """A layer of a model that reports its choices itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_id, self.capture_fn = 0, None


def runner(*layers: nn.Module, experts: int | None = 8, flag: bool = False, eplb: bool = False) -> SimpleNamespace:
    model = nn.Module()
    model.layers = nn.ModuleList(layers)
    text = SimpleNamespace(num_experts=experts, num_experts_per_tok=2)
    config = SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=text),
        parallel_config=SimpleNamespace(enable_eplb=eplb),
        aux_output_config=SimpleNamespace(enable_return_routed_experts=flag),
    )
    return SimpleNamespace(vllm_config=config, get_model=lambda: model)


def test_what_routers_chose_in_a_pass_is_told_after_it() -> None:
    first, second = Router(), Router()
    experts = PassExperts(runner(MoERunner(first), nn.Linear(1, 1), MoERunner(second)))
    with experts.watching(PASS, ours=True):
        first.select_experts(IDS)
        second.select_experts(IDS + 1)
    watch = experts.seen(PASS)
    assert watch is not None
    routes = watch.routes(slice(1, 3), 5)
    assert routes is not None
    assert routes.tolist() == torch.stack([IDS, IDS + 1], 1)[1:3].tolist()
    assert (first.capture_fn, second.capture_fn) == (None, None)


def test_rows_that_fill_up_a_graph_are_left_out_and_shards_of_a_pass_tell_nothing() -> None:
    router = Router()
    experts = PassExperts(runner(MoERunner(router)))
    for ids, told in ((torch.cat([IDS, IDS[:3]]), IDS[:, None].tolist()), (IDS[:3], None)):
        with experts.watching(PASS, ours=True):
            router.select_experts(ids)
        watch = experts.seen(PASS)
        assert watch is not None
        routes = watch.routes(slice(0, 5), 5)
        assert (None if routes is None else routes.tolist()) == told


def test_only_the_last_pass_is_told_and_none_that_is_not_ours() -> None:
    router = Router()
    experts = PassExperts(runner(MoERunner(router)))
    with experts.watching(PASS, ours=True):
        router.select_experts(IDS)
    assert experts.seen({**PASS, "another": 1}) is None
    with experts.watching(PASS, ours=False):
        assert router.capture_fn is None
        router.select_experts(IDS)
    assert experts.seen(PASS) is None


def test_a_pass_whose_routers_are_not_called_shows_nothing() -> None:
    """They are not called if layers run in a CUDA graph, or are compiled."""
    experts = PassExperts(runner(MoERunner(Router())))
    with experts.watching(PASS, ours=True):
        pass
    watch = experts.seen(PASS)
    assert watch is not None
    assert watch.routes(slice(0, 5), 5) is None


def test_vllm_s_own_record_gets_the_ids_too_and_has_its_place_back() -> None:
    told: list[torch.Tensor] = []
    router = Router(capture_fn=lambda ids: told.append(ids.clone()))
    own = router.capture_fn
    experts = PassExperts(runner(MoERunner(router), flag=True))
    with experts.watching(PASS, ours=True):
        router.select_experts(IDS)
    assert [ids.tolist() for ids in told] == [IDS.tolist()]
    assert router.capture_fn is own


def test_routers_that_cannot_be_watched_fail_the_capture_and_not_the_pass() -> None:
    broken = runner(MoERunner(Router()))
    broken.get_model = lambda: (_ for _ in ()).throw(LookupError("no such model"))
    experts = PassExperts(broken)
    with experts.watching(PASS, ours=True):
        pass
    with pytest.raises(RuntimeError, match="LookupError: no such model"):
        experts.seen(PASS)
    with experts.watching(PASS, ours=False):
        pass
    assert experts.seen(PASS) is None


def test_layers_are_described_by_their_numbers_each_once() -> None:
    routing = describe_routing(runner(FusedMoE(Router()), nn.Linear(1, 1), OwnMoE()))
    assert routing is not None
    assert (routing.layers, routing.experts, routing.per_token, routing.unobserved) == ((0, 2), 8, 2, None)


def test_a_dense_model_has_no_experts() -> None:
    dense = runner(nn.Linear(1, 1), experts=None)
    assert describe_routing(dense) is None
    experts = PassExperts(dense)
    with experts.watching(PASS, ours=True):
        pass
    assert experts.seen(PASS) is None


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (runner(nn.Linear(1, 1)), "no layer of Module has a router that vLLM can record"),
        (runner(MoERunner(Router()), eplb=True), "load balancing"),
        (runner(MoERunner(ZeroExpertRouter())), "experts that do nothing"),
        (runner(MoERunner(Router(num_fused_shared_experts=1))), "experts that every token uses"),
        (runner(MoERunner(Router()), MoERunner(KernelRouter())), r"(layers.1): --enable-return-routed-experts"),
        (runner(MoERunner(Router(), monolithic=True)), r"(layers.0): --enable-return-routed-experts"),
    ],
)
def test_the_experts_of_a_model_whose_ids_are_not_proved_are_unknown(model: Any, why: str) -> None:
    routing = describe_routing(model)
    assert routing is not None
    assert why in (routing.unobserved or "")
    experts = PassExperts(model)
    with experts.watching(PASS, ours=True):
        pass
    assert experts.seen(PASS) is None


def test_answers_may_tell_the_experts_that_kernels_choose() -> None:
    model = runner(MoERunner(Router(), monolithic=True), MoERunner(KernelRouter()), flag=True)
    routing = describe_routing(model)
    assert routing is not None
    assert routing.unobserved is None
    experts = PassExperts(model)
    with experts.watching(PASS, ours=True):
        pass
    assert experts.seen(PASS) is None
