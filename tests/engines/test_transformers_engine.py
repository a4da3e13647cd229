"""The engine `transformers`: quantized checkpoints, missing weights, and memory."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from recorded import load, own_logits, record, transformers_subject
from safetensors.torch import load_file, save_file

from pytest_kld.engines.transformers import LoadedTransformer, TransformersEngine
from pytest_kld.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Gate, MakeModel

    from pytest_kld.captures.capture import Capture
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


def test_every_setting_of_the_engine_is_part_of_the_fingerprint(reference_dir: Path) -> None:
    subject = transformers_subject(reference_dir)
    other = {"dtype": "bfloat16", "trust_remote_code": True}
    left_out = {"device"}  # replaced by what the device is
    assert {item.name for item in fields(TransformersEngine)} == other.keys() | left_out
    default = TransformersEngine().fingerprint(subject)
    for name, value in other.items():
        assert TransformersEngine(**{name: value}).fingerprint(subject) == {**default, name: value}
    assert default == TransformersEngine(device="cpu").fingerprint(subject) or torch.cuda.is_available()
    assert default != TransformersEngine().fingerprint(transformers_subject(reference_dir, attn_implementation="eager"))
    assert default["versions"].keys() >= {"torch", "transformers", "accelerate", "peft"}


@pytest.mark.slow
def test_the_instruction_sets_of_a_cpu_are_part_of_the_fingerprint(reference_dir: Path) -> None:
    script = (
        "from pathlib import Path; from pytest_kld.engines.transformers import TransformersEngine as Engine; "
        "from pytest_kld.subjects.model import ModelSpec; from pytest_kld.subjects.subject import Subject; "
        f"subject = Subject(name='a', model=ModelSpec.parse({str(reference_dir)!r}, Path()), engine='transformers'); "
        "print(Engine(device='cpu').fingerprint(subject)['devices'])"
    )
    told = [
        subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, **more}, capture_output=True, text=True, check=True
        ).stdout
        for more in ({}, {"ATEN_CPU_CAPABILITY": "default"})
    ]
    assert told[0].startswith("['cpu ")
    assert told[1].startswith("['cpu DEFAULT")


PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


@pytest.mark.parametrize("offloaded", [*PARTS[:2], "lm_head", PARTS], ids=str)
def test_an_offloaded_model_is_captured_like_any_other(
    offloaded: str | tuple[str, ...], reference_dir: Path, windows: Windows, tmp_path: Path
) -> None:
    device_map = {part: "disk" if part in offloaded else "cpu" for part in PARTS}
    arguments = {"device_map": device_map, "offload_folder": str(tmp_path / "offload")}
    capture = record(reference_dir, windows, tmp_path / "cache", arguments=arguments)
    assert_same(capture, record(reference_dir, windows, tmp_path / "plain"))


def test_a_model_in_the_memory_of_the_cpu_is_captured_like_any_other(
    reference_dir: Path, windows: Windows, tmp_path: Path
) -> None:
    from accelerate import cpu_offload

    def offload(network: Any) -> Any:
        offloaded = cpu_offload(network, execution_device=torch.device("cpu"))
        assert offloaded.lm_head.weight.is_meta
        return offloaded

    capture = record(reference_dir, windows, tmp_path / "cache", alter=offload)
    assert_same(capture, record(reference_dir, windows, tmp_path / "plain"))


def assert_same(capture: Capture, plain: Capture) -> None:
    """Both hold the same hidden states and the same head, bit by bit."""
    assert capture.store == plain.store == "hidden"
    for window in range(plain.windows):
        assert torch.equal(capture.rows(window, 0, 64), plain.rows(window, 0, 64))
    one, other = capture.load_head(), plain.load_head()
    assert one is not None
    assert other is not None
    assert torch.equal(one.weight, other.weight)


def test_a_head_without_a_weight_is_an_error(reference_dir: Path) -> None:
    network: Any = load(reference_dir)
    network.lm_head.to("meta")
    with pytest.raises(ModelError, match=r"the weight of its head is on the device `meta`.*--kld-store=logits"):
        _ = LoadedTransformer(network, "a model", None).heads


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("first", ["--kld-trust-remote-code", ""])
def test_a_model_with_and_without_its_own_code_has_two_captures(
    first: str, make_model: MakeModel, reference_dir: Path, gate: Gate, tmp_path: Path
) -> None:
    path = make_model(f"own-code{first}")
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_loud.LoudForCausalLM"}
    (path / "config.json").write_text(json.dumps(config))
    (path / "modeling_loud.py").write_text(OWN_CODE)
    cache = f"--kld-cache-dir={tmp_path / 'cache'}"
    means = {}
    for option in (first, "" if first else "--kld-trust-remote-code"):
        gate(*filter(None, (option, cache, "--kld-max-mean=100", "--kld-json=report.json")), candidates=(path,))
        (result,) = gate.results()
        means[option] = result["figures"]["mean"]
    assert means[""] == 0
    assert means["--kld-trust-remote-code"] > 0.5


OWN_CODE = """
from transformers import Qwen3ForCausalLM


class LoudForCausalLM(Qwen3ForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 3
        return output
"""


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
