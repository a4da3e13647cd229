"""The engine `transformers`: quantized checkpoints, missing weights, and memory."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from recorded import load, own_logits, record, transformers_subject
from safetensors.torch import load_file, save_file

from pytest_kld.engines.transformers import TransformersEngine
from pytest_kld.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import MakeModel

    from pytest_kld.text.windows import Windows


def bitsandbytes() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def torchao() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig(version=2))


def quanto() -> Any:
    from transformers import QuantoConfig

    return QuantoConfig(weights="int8")


@pytest.mark.filterwarnings("default")  # quantizers use what torch deprecates
@pytest.mark.parametrize("quantization", [bitsandbytes, torchao, quanto])
def test_quantized_models_are_run_as_transformers_loads_them(
    quantization: Callable[[], Any], reference_dir: Path, windows: Windows, tmp_path: Path
) -> None:
    capture = record(reference_dir, windows, tmp_path, arguments={"quantization_config": quantization()})
    assert capture.store == "hidden"  # the head is not quantized
    head = capture.load_head()
    assert head is not None
    hidden = torch.stack([capture.rows(window, 0, 64) for window in range(windows.count)])
    expected = own_logits(load(reference_dir, quantization_config=quantization()), windows)
    torch.testing.assert_close(head.logits(hidden.flatten(0, 1)), expected.flatten(0, 1), rtol=1e-4, atol=1e-4)
    plain = own_logits(load(reference_dir), windows)
    assert (plain - expected).abs().max() > 1e-3


def test_quantization_is_part_of_the_fingerprint(reference_dir: Path) -> None:
    engine = TransformersEngine()
    plain, quantized, again = (
        engine.fingerprint(transformers_subject(reference_dir, **arguments))
        for arguments in ({}, {"quantization_config": bitsandbytes()}, {"quantization_config": bitsandbytes()})
    )
    assert "bitsandbytes" in quantized["versions"]
    assert "bitsandbytes" not in plain["versions"]
    assert plain != quantized == again


@pytest.mark.parametrize("change", ["missing", "shape"])
@pytest.mark.filterwarnings("default")
def test_a_checkpoint_that_lacks_weights_is_refused(
    change: str, make_model: MakeModel, windows: Windows, tmp_path: Path
) -> None:
    path = make_model(f"lacks-{change}") / "model.safetensors"
    weights, name = load_file(path), "model.layers.1.mlp.up_proj.weight"
    tensor = weights.pop(name)
    save_file(weights if change == "missing" else {**weights, name: tensor[:5].clone()}, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of the model's weights|cannot load .*lacks-shape"):
        record(path.parent, windows, tmp_path)


@pytest.mark.filterwarnings("default")
def test_a_truncated_checkpoint_is_an_error(make_model: MakeModel, windows: Windows, tmp_path: Path) -> None:
    path = make_model("truncated") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"transformers cannot load .*truncated"):
        record(path.parent, windows, tmp_path)


def test_a_broken_config_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot read the config"):
        TransformersEngine().facts(transformers_subject(tmp_path))


def test_a_model_is_gone_from_memory_before_the_next_loads(
    reference_dir: Path, candidate_dir: Path, windows: Windows, tmp_path: Path
) -> None:
    loaded: list[weakref.ref[Any]] = []

    def watch(network: Any) -> Any:
        assert [ref() for ref in loaded] == [None] * len(loaded)
        loaded.append(weakref.ref(network))
        return network

    for model in (reference_dir, candidate_dir):
        record(model, windows, tmp_path, alter=watch)
        assert [ref() for ref in loaded] == [None] * len(loaded)
    assert len(loaded) == 2


def test_a_model_is_gone_from_memory_after_an_error_too(reference_dir: Path, windows: Windows, tmp_path: Path) -> None:
    loaded: list[weakref.ref[Any]] = []

    def fail(network: Any) -> Any:
        loaded.append(weakref.ref(network))
        network.register_forward_hook(lambda *_: 1 / 0)
        return network

    with pytest.raises(Exception, match="ZeroDivisionError"):
        record(reference_dir, windows, tmp_path, alter=fail)
    gc.collect()
    assert loaded[0]() is None
