"""Which experts a model uses, watched in transformers. The oracle is the model's own router."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from recorded import load, record, transformers_subject
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from pytest_kld.captures.capture import Capture
from pytest_kld.captures.manifest import EXPERTS_FILE
from pytest_kld.captures.routes import TOKENS, checked_routes
from pytest_kld.engines import Routing
from pytest_kld.engines.transformers import TransformersEngine
from pytest_kld.errors import CaptureError, DamagedCaptureError

if TYPE_CHECKING:
    from conftest import MakeModel
    from transformers import PretrainedConfig

    from pytest_kld.text.windows import Windows

SMALL = {
    "vocab_size": 1024,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
EIGHT = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MLA = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_shared_experts": 1,
}
FAMILIES: dict[str, tuple[PretrainedConfig, int]] = {
    "mixtral": (MixtralConfig(**SMALL, num_local_experts=8, num_experts_per_tok=2), 0),
    "qwen2-moe": (Qwen2MoeConfig(**SMALL, **EIGHT, shared_expert_intermediate_size=16), 0),
    "qwen3-moe": (Qwen3MoeConfig(**SMALL, **EIGHT, head_dim=16), 0),
    "olmoe": (OlmoeConfig(**SMALL, num_experts=8, num_experts_per_tok=2), 0),
    "gpt-oss": (
        GptOssConfig(
            **SMALL, num_local_experts=8, num_experts_per_tok=2, head_dim=16, layer_types=["full_attention"] * 2
        ),
        0,
    ),
    "deepseek-v2": (DeepseekV2Config(**{**SMALL, **MLA}, topk_method="greedy"), 1),
    "deepseek-v3": (DeepseekV3Config(**{**SMALL, **MLA}), 1),
}
"""A config of each family, and its first layer with experts."""


@torch.inference_mode()
def own_routes(network: Any, ids: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """Return what each router gives a window, as one array [N, K] of ascending ids a layer."""
    told: list[Any] = []
    routers = [module for name, module in network.named_modules() if name.endswith((".gate", ".router"))]
    hooks = [router.register_forward_hook(lambda _, __, output: told.append(output)) for router in routers]
    network(input_ids=torch.from_numpy(ids).long()[None])
    for hook in hooks:
        hook.remove()
    routes = []
    for output in told:
        if isinstance(output, tuple):
            chosen = next(part for part in output if not part.is_floating_point())
        else:  # DeepSeek-V2: the router gives logits only
            chosen = output.softmax(-1).topk(2).indices
        routes.append(np.sort(chosen.reshape(len(ids), -1).numpy(), axis=1))
    return routes


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "deepseek-v3"])
def test_routes_are_those_of_the_models_own_routers(
    family: str, make_model: MakeModel, windows: Windows, tmp_path: Path
) -> None:
    config, first = FAMILIES[family]
    model = make_model(f"routes-{family}", config)
    capture = record(model, windows, tmp_path)
    layers = config.num_hidden_layers - first
    assert capture.routing == {"layers": [*range(first, first + layers)], "experts": 8, "unobserved": None}
    network = load(model)
    for window in range(windows.count):
        routes = capture.routes(window).numpy()
        assert routes.shape == (windows.size, layers, 2)
        assert routes.dtype == np.uint8
        for layer, own in enumerate(own_routes(network, windows.token_ids[window])):
            np.testing.assert_array_equal(routes[:, layer], own)


@pytest.mark.parametrize("family", ["mixtral", "deepseek-v3"])
def test_tokens_of_experts_add_up_to_the_positions_in_every_layer(
    family: str, make_model: MakeModel, windows: Windows, tmp_path: Path
) -> None:
    capture = record(make_model(f"routes-{family}", FAMILIES[family][0]), windows, tmp_path)
    with capture._open_file(EXPERTS_FILE) as file:
        tokens = file.get_tensor(TOKENS)
    assert tokens.dtype == torch.int64
    assert tokens.shape == (2, 8)
    assert tokens.sum(1).tolist() == [windows.token_ids.size * 2] * 2
    counted = np.zeros((2, 8), int)
    for window in range(windows.count):
        for layer, ids in enumerate(capture.routes(window).numpy().transpose(1, 0, 2)):
            counted[layer] += [int((ids == expert).sum()) for expert in range(8)]
    np.testing.assert_array_equal(tokens.numpy(), counted)


def test_a_dense_model_keeps_no_routes(reference_dir: Path, windows: Windows, tmp_path: Path) -> None:
    capture = record(reference_dir, windows, tmp_path)
    assert capture.routing is None
    assert EXPERTS_FILE not in capture.manifest["files"]


def test_a_model_that_shows_no_routes_says_why(make_model: MakeModel, windows: Windows, tmp_path: Path) -> None:
    config = Llama4TextConfig(
        **SMALL, num_local_experts=4, num_experts_per_tok=1, head_dim=16, intermediate_size_mlp=32
    )
    capture = record(make_model("llama4", config), windows, tmp_path)
    assert capture.routing is not None
    assert "Llama4ForCausalLM shows" in capture.routing["unobserved"]
    assert EXPERTS_FILE not in capture.manifest["files"]


def test_experts_that_run_twice_in_a_pass_are_not_counted(
    make_model: MakeModel, windows: Windows, tmp_path: Path
) -> None:
    def repeat(network: Any) -> Any:
        layer = network.model.layers[1].mlp
        once = layer.forward
        layer.forward = lambda hidden: (once(hidden), once(hidden))[1]
        return network

    capture = record(make_model("routes-mixtral", FAMILIES["mixtral"][0]), windows, tmp_path, alter=repeat)
    assert capture.routing is not None
    assert capture.routing["unobserved"] == "the experts of layer 1 ran 2 times in one pass"


def test_a_layer_that_misses_tokens_later_is_an_error(
    make_model: MakeModel, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("routes-mixtral", FAMILIES["mixtral"][0])
    with TransformersEngine(dtype="float32", device="cpu").open(transformers_subject(model)) as loaded:
        prefills = loaded.prefill(windows, [0, 1], None)
        assert next(prefills).experts is not None
        monkeypatch.setattr(loaded.network.model.layers[0].mlp, "forward", lambda hidden: hidden)
        with pytest.raises(CaptureError, match="layer 0 ran 0 times in one pass, though not in the first window"):
            next(prefills)


def test_a_damaged_count_of_tokens_is_found(make_model: MakeModel, windows: Windows, tmp_path: Path) -> None:
    capture = record(make_model("routes-mixtral", FAMILIES["mixtral"][0]), windows, tmp_path)
    path = capture.path / EXPERTS_FILE
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(DamagedCaptureError, match=EXPERTS_FILE):
        Capture.open(capture.path, windows).verify()
    path.unlink()
    with pytest.raises(DamagedCaptureError, match=EXPERTS_FILE):
        Capture.open(capture.path, windows)


ROUTING = Routing(layers=(0, 1), experts=4)


@pytest.mark.parametrize(
    ("routes", "message"),
    [
        (torch.zeros(3, 1, 1), "expected 3 positions and 2 layers"),
        (torch.zeros(2, 2, 1), "expected 3 positions and 2 layers"),
        (torch.full((3, 2, 1), 4), "a layer has 4"),
        (torch.full((3, 2, 1), -1), "a layer has 4"),
        (torch.ones(3, 2, 2), "the same expert twice"),
    ],
    ids=["layers", "positions", "above", "below", "twice"],
)
def test_routes_that_cannot_be_right_are_refused(routes: torch.Tensor, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        checked_routes(routes.to(torch.int32), ROUTING, 3, "a model, window 0")


@pytest.mark.parametrize(("experts", "dtype"), [(256, torch.uint8), (257, torch.int16), (40_000, torch.int32)])
def test_ids_are_stored_in_the_smallest_type_and_in_order(experts: int, dtype: torch.dtype) -> None:
    routes = torch.tensor([[[experts - 1, 0]]])
    stored = checked_routes(routes, Routing(layers=(0,), experts=experts), 1, "a model")
    assert stored.dtype == dtype
    assert stored.tolist() == [[[0, experts - 1]]]


@pytest.mark.parametrize("concurrency", [1, 3])
def test_decoding_goes_through_the_experts_of_the_prefill(
    concurrency: int, make_model: MakeModel, windows: Windows, tmp_path: Path
) -> None:
    model = make_model("routes-mixtral", FAMILIES["mixtral"][0])
    prefilled = record(model, windows, tmp_path / "prefill")
    decoded = record(model, windows.decoded(16, concurrency), tmp_path / "decode")
    assert decoded.routing == prefilled.routing
    for window in range(windows.count):
        assert torch.equal(decoded.routes(window), prefilled.routes(window)[16:])
