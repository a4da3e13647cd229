"""Heads: what is recomputed from hidden states is what the model says, and what is not is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import TINY, MakeModel
from recorded import load, own_logits, record
from transformers import (
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from pytest_kld.captures.capture import LogitsReader
from pytest_kld.errors import CaptureError
from pytest_kld.kernel.head import Head, check_head

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from pytest_kld.kernel.head import HeadMode
    from pytest_kld.text.windows import Windows

CPU = torch.device("cpu")
WITHOUT_HEAD_DIM = {name: value for name, value in TINY.items() if name != "head_dim"}
MOE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
ARCHITECTURES: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "llama": (LlamaConfig(**TINY, tie_word_embeddings=False), lambda z: z),
    "llama-tied": (LlamaConfig(**TINY, tie_word_embeddings=True), lambda z: z),
    "qwen3": (Qwen3Config(**TINY, tie_word_embeddings=False), lambda z: z),
    "qwen3-moe": (Qwen3MoeConfig(**TINY, **MOE), lambda z: z),
    "qwen2-moe": (Qwen2MoeConfig(**WITHOUT_HEAD_DIM, **MOE, shared_expert_intermediate_size=32), lambda z: z),
    "gemma2": (Gemma2Config(**TINY, final_logit_softcapping=5.0), lambda z: 5 * torch.tanh(z / 5)),
    "gemma3": (Gemma3TextConfig(**TINY), lambda z: z),
    "cohere": (CohereConfig(**WITHOUT_HEAD_DIM, logit_scale=0.3), lambda z: z * 0.3),
    "granite": (GraniteConfig(**WITHOUT_HEAD_DIM, logits_scaling=7.0), lambda z: z / 7),
    "phi": (PhiConfig(**WITHOUT_HEAD_DIM), lambda z: z),
}
"""Configs, and the transform of the product that each architecture's paper or code gives."""


def read(capture: Any, mode: HeadMode) -> Tensor:
    reader = LogitsReader.of(capture, mode, CPU)
    size = capture.manifest["protocol"]["window_size"]
    return torch.stack([reader.logits(window, 0, size) for window in range(capture.windows)])


@torch.inference_mode()
def in_float64(network: Any, windows: Windows, transform: Callable[[Tensor], Tensor]) -> Tensor:
    """The head in float64, on the hidden states that the decoder gives."""
    ids = torch.from_numpy(windows.token_ids).long()
    hidden = torch.cat([network.model(input_ids=row[None]).last_hidden_state for row in ids]).double()
    head = network.get_output_embeddings()
    return transform(hidden @ head.weight.double().T + (0 if head.bias is None else head.bias.double()))


@pytest.fixture(scope="module")
def architecture(make_model: MakeModel) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make_model(f"architecture-{name}", ARCHITECTURES[name][0])
        return made[name]

    return get


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, dtype) for name in ARCHITECTURES for dtype in ("float32", "bfloat16")),
        ("llama", "float16"),
        ("gemma2", "float16"),
    ],
)
def test_head_is_proved_and_recomputed(
    name: str, dtype: str, architecture: Callable[[str], Path], windows: Windows, tmp_path: Path
) -> None:
    capture = record(architecture(name), windows, tmp_path, dtype=dtype)
    assert (capture.store, capture.manifest["store_reason"]) == ("hidden", "check rows agree with the head")
    assert 0 < capture.manifest["checks"]["rows"] == 2 * windows.count
    capture.verify()
    network = load(architecture(name), dtype)
    engine, exact, native = own_logits(network, windows), read(capture, "exact"), read(capture, "native")
    eps = torch.finfo(engine.dtype).eps
    assert native.dtype == engine.dtype
    torch.testing.assert_close(native, engine, rtol=2 * eps, atol=2 * eps)
    assert exact.dtype == torch.float32
    expected = in_float64(network, windows, ARCHITECTURES[name][1])
    torch.testing.assert_close(exact.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bias_of_the_head_is_kept_and_used_in_both_modes(
    dtype: str, architecture: Callable[[str], Path], windows: Windows, tmp_path: Path
) -> None:
    def with_bias(network: Any) -> Any:
        torch.nn.init.normal_(network.lm_head.bias, generator=torch.Generator().manual_seed(0))
        return network

    capture = record(architecture("phi"), windows, tmp_path, dtype=dtype, alter=with_bias)
    head = capture.load_head()
    assert head is not None
    assert head.bias is not None
    assert head.bias.abs().max() > 1
    assert capture.check_head().faithful
    assert capture.check_head().dtype == dtype
    network = with_bias(load(architecture("phi"), dtype))
    engine, eps = own_logits(network, windows), torch.finfo(getattr(torch, dtype)).eps
    torch.testing.assert_close(read(capture, "native"), engine, rtol=2 * eps, atol=2 * eps)
    expected = in_float64(network, windows, lambda z: z)
    torch.testing.assert_close(read(capture, "exact").double(), expected, rtol=1e-5, atol=1e-5)


def scaled(network: Any) -> Any:
    network.lm_head.register_forward_hook(lambda _module, _args, logits: logits * 1.1)
    return network


def permuted(network: Any) -> Any:
    order = torch.randperm(network.config.vocab_size, generator=torch.Generator().manual_seed(0))
    network.lm_head.register_forward_hook(lambda _module, _args, logits: logits[..., order])
    return network


def lora(network: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(network, LoraConfig(target_modules=["lm_head"], r=4, init_lora_weights=False)).eval()


def quanto(network: Any) -> Any:
    from optimum.quanto import freeze, qint8, quantize

    quantize(network, weights=qint8, include="*lm_head")
    freeze(network)
    return network


def quanto_not_frozen(network: Any) -> Any:
    """Its weight still is a float parameter; only what the module computes tells that it is quantized."""
    from optimum.quanto import qint8, quantize

    quantize(network, weights=qint8, include="*lm_head")
    return network


def torchao(network: Any) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(network, Int8WeightOnlyConfig(version=2), filter_fn=lambda _, name: name == "lm_head")
    return network


def run_twice(network: Any) -> Any:
    """As a speculative layer that shares the head does."""
    network.register_forward_hook(lambda module, _args, output: (module.lm_head(torch.zeros(1, 3, 64)), output)[1])
    return network


@pytest.mark.filterwarnings("default")  # peft and the quantizers use what torch deprecates
@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        (scaled, "its head is not linear: check rows differ by"),
        (permuted, "its head is not linear: check rows differ by"),
        (lora, "its head is not linear: check rows differ by"),
        (quanto_not_frozen, "its head is not linear: check rows differ by"),
        (quanto, "the model has no plain linear head"),
        (torchao, "the model has no plain linear head"),
        (run_twice, "the head's input was not recorded"),
    ],
)
def test_another_head_is_refused_and_logits_are_kept(
    alter: Callable[[Any], Any], reason: str, reference_dir: Path, windows: Windows, tmp_path: Path
) -> None:
    capture = record(reference_dir, windows, tmp_path / "auto", alter=alter)
    assert capture.store == "logits"
    assert reason in capture.manifest["store_reason"]
    assert reason in json.loads((capture.path / "capture.json").read_text())["store_reason"]
    torch.testing.assert_close(read(capture, "exact"), own_logits(alter(load(reference_dir)), windows))
    with pytest.raises(CaptureError, match=r"--kld-store=hidden is not possible.*Give auto or logits"):
        record(reference_dir, windows, tmp_path / "hidden", alter=alter, store="hidden")


def test_a_head_that_fails_after_the_first_window_is_an_error(
    reference_dir: Path, windows: Windows, tmp_path: Path
) -> None:
    def from_the_second_window_on(network: Any) -> Any:
        calls = iter([1.0, 1.0])  # the probe, and the first window
        network.lm_head.register_forward_hook(lambda _module, _args, logits: logits * next(calls, 1.5))
        return network

    with pytest.raises(CaptureError, match="though not in the first window"):
        record(reference_dir, windows, tmp_path, alter=from_the_second_window_on)
    assert not list(tmp_path.rglob("capture.json"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("alter", ["scale", "softcap", "permute", "int8", "one token"])
def test_check_rows_tell_heads_apart_in_every_dtype(dtype: torch.dtype, alter: str) -> None:
    torch.manual_seed(0)
    weight, hidden = torch.randn(1024, 64).to(dtype) * 0.4, torch.randn(4, 64).to(dtype)
    honest = (hidden.double() @ weight.double().T).to(dtype)
    assert check_head(Head(weight=weight), hidden, honest).faithful
    step = weight.double().abs().amax(-1, keepdim=True) / 127
    others = {
        "scale": honest * 1.05,
        "softcap": 15 * torch.tanh(honest / 15),
        "permute": honest.roll(1, -1),
        "int8": (hidden.double() @ ((weight.double() / step).round() * step).T).to(dtype),
        "one token": honest.index_fill(1, torch.tensor([77]), 9.0),
    }
    assert not check_head(Head(weight=weight), hidden, others[alter]).faithful


def test_check_rows_that_are_not_finite_on_one_side_only_refuse_the_head() -> None:
    weight, hidden = torch.eye(8), torch.ones(2, 8)
    logits = hidden.clone()
    logits[1, 3] = torch.nan
    assert not check_head(Head(weight=weight), hidden, logits).faithful
    hidden[1] = torch.nan
    check = check_head(Head(weight=weight), hidden, logits)
    assert (check.faithful, check.rows) == (True, 1)
    hidden[0], logits[0] = torch.inf, torch.inf
    nothing = {"rows": 0, "worst": 0.0, "mean_kl_nats": 0.0, "tolerance_dtype": "float32"}
    assert check_head(Head(weight=weight), hidden, logits).to_json() == nothing


def test_padding_is_trimmed_with_its_bias() -> None:
    head = Head(weight=torch.randn(10, 4), bias=torch.randn(10), scale=0.5).trim(7)
    assert head.vocab_size == 7
    assert head.logits(torch.randn(3, 4)).shape == (3, 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("alter", [None, "softcap", "permute", "int8"])
def test_a_softcap_in_float32_on_a_product_in_16_bits_is_faithful_and_another_head_is_not(
    dtype: torch.dtype, alter: str | None
) -> None:
    torch.manual_seed(0)
    weight, hidden = torch.randn(1024, 64).to(dtype) * 0.4, torch.randn(4, 64).to(dtype)
    head, step = Head(weight=weight, softcap=5.0), weight.double().abs().amax(-1, keepdim=True) / 127
    product = (hidden.double() @ weight.double().T).to(dtype)
    if alter == "permute":
        product = product.roll(1, -1)
    elif alter == "int8":
        product = (hidden.double() @ ((weight.double() / step).round() * step).T).to(dtype)
    cap = 4.5 if alter == "softcap" else 5.0
    engine = cap * torch.tanh(product.float() / cap)
    assert check_head(head, hidden, engine).faithful is (alter is None)


@pytest.mark.parametrize("error", [TypeError, RuntimeError, NotImplementedError])
def test_a_device_without_a_mixed_product_gets_the_same_logits_in_tiles(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    head = Head(weight=torch.randn(300, 64, generator=generator, dtype=torch.bfloat16))
    hidden = torch.randn(5, 64, generator=generator, dtype=torch.bfloat16)
    expected = head.logits(hidden)
    product, asked = torch.mm, []

    def mm(*tensors: Tensor, **options: Any) -> Tensor:
        if "out_dtype" in options:
            asked.append(options["out_dtype"])
            raise error("mm() got an unexpected keyword argument 'out_dtype'")
        return product(*tensors, **options)

    monkeypatch.setattr("torch.mm", mm)
    monkeypatch.setattr("pytest_kld.kernel.head._has_mixed_product", lambda _: True)
    monkeypatch.setattr("pytest_kld.kernel.head._TILE_ELEMENTS", 64 * 7)
    torch.testing.assert_close(head.logits(hidden), expected, rtol=1e-6, atol=1e-6)
    assert asked == [torch.float32]


def test_a_product_that_runs_out_of_memory_is_not_tried_in_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def mm(*tensors: Tensor, **options: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("torch.mm", mm)
    monkeypatch.setattr("pytest_kld.kernel.head._has_mixed_product", lambda _: True)
    with pytest.raises(torch.OutOfMemoryError):
        Head(weight=torch.zeros(3, 2, dtype=torch.bfloat16)).logits(torch.zeros(1, 2, dtype=torch.bfloat16))
