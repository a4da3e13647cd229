"""Watching experts inside a server: what hooks on the modules that choose them tell of one pass."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pytest_kld.hook.decoder import Decoder, Step
from pytest_kld.hook.experts import ExpertWatch, layers_of, on_outputs
from pytest_kld.hook.protocol import (
    REQUEST_FILE,
    CaptureRequest,
    new_run,
    piece_file,
    request_id,
    tokens_file,
    write_json_whole,
)
from pytest_kld.hook.run import Run
from pytest_kld.hook.sglang import _routing, routed_ids
from pytest_kld.hook.writer import Writer


class TopK(nn.Module):
    """Chooses the experts that it is told; `shared` more columns follow."""

    def __init__(self, shared: int = 0) -> None:
        super().__init__()
        self.topk_config = SimpleNamespace(num_fused_shared_experts=shared)

    def forward(self, ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(topk_ids=ids)


def test_a_pass_shows_the_experts_of_a_part_of_its_tokens_in_every_layer() -> None:
    layers = [TopK(), TopK(shared=1)]
    watch = ExpertWatch(layers, on_outputs(routed_ids))
    watch.attach()
    first = torch.arange(10).reshape(5, 2)
    layers[0](first)
    layers[1](torch.cat([first + 1, torch.full((5, 1), 99)], 1))
    kept = first.clone()
    first.zero_()  # a kernel uses the memory again
    routes = watch.routes(slice(2, 4), 5)
    assert torch.equal(routes, torch.stack([kept, kept + 1], 1)[2:4].to(torch.int32))
    watch.detach()
    layers[0](kept)
    assert watch.routes(slice(2, 4), 5) is None


@pytest.mark.parametrize("fault", ["a layer ran in a graph", "a layer ran twice", "tokens are missing", "other output"])
def test_a_pass_that_does_not_show_every_token_shows_none(fault: str) -> None:
    layers = [TopK(), TopK()]
    watch = ExpertWatch(layers, on_outputs(routed_ids))
    watch.attach()
    ids = torch.zeros(5, 2, dtype=torch.int32)
    layers[0](ids)
    if fault == "a layer ran twice":
        layers[0](ids)
    if fault == "other output":
        layers[1].forward = lambda ids: SimpleNamespace(packed=ids)  # type: ignore[method-assign]
    if fault != "a layer ran in a graph":
        layers[1](ids[:4] if fault == "tokens are missing" else ids)
    assert watch.routes(slice(0, 5), 5) is None


@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        (("model.layers.3.mlp.topk", "model.layers.4.mlp.topk"), (3, 4)),
        (("transformer.h.1.moe", "transformer.h.2.moe"), (1, 2)),
        (("model.layers.3.mlp.a", "model.layers.3.mlp.b"), (0, 1)),
        (("first", "second"), (0, 1)),
        ((), ()),
    ],
)
def test_layers_have_the_numbers_in_their_names(names: tuple[str, ...], numbers: tuple[int, ...]) -> None:
    assert layers_of(names) == numbers


def runner(*routers: nn.Module, experts: int | None = 8, **arguments: object) -> SimpleNamespace:
    model = nn.Module()
    model.layers = nn.ModuleList(routers)
    config = SimpleNamespace(hf_text_config=SimpleNamespace(num_experts=experts))
    return SimpleNamespace(model=model, model_config=config, server_args=SimpleNamespace(**arguments))


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"enable_eplb": True}, "load balancing"),
        ({"ep_num_redundant_experts": 2}, "load balancing"),
        ({"init_expert_location": "places.pt"}, "--init-expert-location"),
    ],
)
def test_sglang_s_experts_are_unknown_where_ids_are_not_those_of_the_model(
    arguments: dict[str, object], why: str
) -> None:
    routing = _routing(runner(TopK(), **arguments))
    assert why in routing.unobserved


def test_sglang_s_experts_are_those_of_its_topk_modules() -> None:
    routing = _routing(runner(TopK(), nn.Linear(1, 1), TopK(), init_expert_location="trivial"))
    assert (routing.layers, routing.experts, routing.unobserved) == ((0, 2), 8, None)
    assert _routing(runner(TopK(), experts=None)) is None
    assert "TopK" in _routing(runner(nn.Linear(1, 1))).unobserved


class Unreadable(ExpertWatch):
    """One whose layers do not fit together, as if they were on several devices."""

    def routes(self, *_: object) -> torch.Tensor | None:
        raise RuntimeError("odd")


def decode_steps(directory: Path, shown: Sequence[bool], failing: str = "") -> dict[str, torch.Tensor]:
    """Decode a window of six tokens after a prompt of two, two requests together, and read the rows of the second.

    Args:
        directory: the run's.
        shown: for each step, whether its layers run where hooks see them.
        failing: what fails: `find`, or `read` of what the layers showed.

    """
    run, tokens = Run(directory / new_run()), list(range(10, 16))
    run.path.mkdir()
    write_json_whole(run.path / REQUEST_FILE, CaptureRequest(hidden=True, rows=(3,), prompt_size=2).to_json())
    write_json_whole(run.path / tokens_file(1), tokens)
    ids, router = ["somebody-else", request_id(run.path.name, 1)], TopK()
    decoder = Decoder(lambda name: run if name == run.path.name else None, Writer())

    def find() -> ExpertWatch:
        if failing == "find":
            raise LookupError("no such layers")
        return (Unreadable if failing == "read" else ExpertWatch)([router], on_outputs(routed_ids))

    for position, seen in zip(range(2, 6), shown, strict=True):
        decoder.begin(ids)
        with decoder.watching_experts(find):
            if seen:
                router(torch.tensor([[7, 6], [position, position + 1]]))
        if seen:
            decoder.see_hidden(torch.full((2, 4), float(position)))
        step = Step(
            rank=0,
            positions=[40, position],
            decoding=[True, True],
            token_ids=torch.tensor([3, tokens[position]]),
            logits=torch.zeros(2, 5),
        )
        decoder.take(ids, lambda step=step: step)  # type: ignore[misc]
    path = run.path / piece_file(1, 2)
    deadline = time.monotonic() + 20
    while not path.is_file() and not list(run.path.glob("error-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    reports = "".join(report.read_text() for report in run.path.glob("error-*"))
    assert not reports, reports
    return load_file(path)


def test_decode_steps_show_the_experts_of_each_request(tmp_path: Path) -> None:
    rows = decode_steps(tmp_path, [True] * 4)
    assert rows["token_ids"].tolist() == [12, 13, 14, 15]
    assert rows["experts"].tolist() == [[[2, 3]], [[3, 4]], [[4, 5]], [[5, 6]]]
    assert rows["rows"].tolist() == [3]


def test_what_only_some_decode_steps_show_is_left_out(tmp_path: Path) -> None:
    rows = decode_steps(tmp_path, [True, False, True, True])
    assert sorted(rows) == ["logits", "rows", "together", "token_ids"]
    assert len(rows["token_ids"]) == 4


@pytest.mark.parametrize(("failing", "error"), [("find", "LookupError: no such layers"), ("read", "RuntimeError: odd")])
def test_experts_that_cannot_be_found_or_read_fail_the_run_and_not_the_server(
    tmp_path: Path, failing: str, error: str
) -> None:
    with pytest.raises(AssertionError, match=error):
        decode_steps(tmp_path, [True] * 4, failing)
