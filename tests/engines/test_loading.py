"""Checkpoints that transformers would run in part, or as something else: each is damaged for real."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import TINY
from recorded import load, own_logits, record, transformers_subject
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, Qwen3Config

from pytest_kld.engines.loading import move
from pytest_kld.engines.transformers import TransformersEngine
from pytest_kld.errors import ModelError
from pytest_kld.subjects.model import ModelSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import MakeModel
    from torch import Tensor

    from pytest_kld.text.windows import Windows

pytestmark = pytest.mark.filterwarnings("default")  # transformers and the quantizers warn of what is damaged here
UP = "model.layers.1.mlp.up_proj.weight"


def change_config(model: Path, **changes: Any) -> None:
    """Set fields of a config.json; None removes one."""
    path = model / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def change_weights(model: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    path = model / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


def to_fp8(weights: dict[str, Tensor], block: int = 16) -> None:
    """Quantize the projections as DeepSeek's format has them: float8 and a scale for each block."""
    for name in [name for name in weights if name.endswith("proj.weight")]:
        rows, columns = (size // block for size in weights[name].shape)
        blocks = weights[name].reshape(rows, block, columns, block)
        scale = blocks.abs().amax((1, 3), keepdim=True) / 448
        weights[name] = (blocks / scale).reshape(weights[name].shape).to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = scale[:, 0, :, 0].contiguous()


FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "exl9"}, r"config\.json declares quant_method 'exl9', .* supports .*compressed-tensors"),
        ({"bits": 4}, r"config\.json declares quant_method 'unknown'"),
        ({"quant_method": "bitsandbytes"}, r"'bitsandbytes without load_in_4bit or load_in_8bit'"),
    ],
)
def test_an_unknown_quantization_is_refused_before_anything_loads(
    quantization: dict[str, Any], message: str, make_model: MakeModel
) -> None:
    path = make_model("unknown")
    change_config(path, quantization_config=quantization)
    with pytest.raises(ModelError, match=f"{path}.*{message}"):
        TransformersEngine().facts(transformers_subject(path))


def test_a_quantization_under_another_key_is_refused(make_model: MakeModel) -> None:
    path = make_model("other-key")
    change_config(path, compression_config={"quant_method": "compressed-tensors"})
    with pytest.raises(ModelError, match="declares a quantization as `compression_config`"):
        TransformersEngine().facts(transformers_subject(path))


def test_an_argument_that_the_config_overrides_is_refused(make_model: MakeModel) -> None:
    from transformers import BitsAndBytesConfig

    path = make_model("two-quantizations")
    change_config(path, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    argument = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    with pytest.raises(ModelError, match="transformers would ignore the argument"):
        TransformersEngine().facts(transformers_subject(path, **argument))


@pytest.mark.parametrize(
    "quantization",
    [
        FP8,  # would be dequantized on a CPU, but there is nothing to dequantize
        {"quant_method": "mxfp4"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {}, "ignore": []},
    ],
    ids=lambda quantization: str(quantization["quant_method"]),
)
def test_plain_weights_that_are_said_to_be_quantized_are_refused(
    quantization: dict[str, Any], make_model: MakeModel, windows: Windows, tmp_path: Path
) -> None:
    path = make_model("plain")
    change_config(path, quantization_config=quantization)
    with pytest.raises(ModelError, match=r"is said to be quantized \(.*plain"):
        record(path, windows, tmp_path)


def test_a_quantization_that_leaves_out_every_module_is_refused(
    reference_dir: Path, windows: Windows, tmp_path: Path
) -> None:
    from transformers import BitsAndBytesConfig

    nothing = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["model", "lm_head"])
    with pytest.raises(ModelError, match="not one of its modules is"):
        record(reference_dir, windows, tmp_path, arguments={"quantization_config": nothing})


def test_weights_that_are_dequantized_on_load_are_run(make_model: MakeModel, windows: Windows, tmp_path: Path) -> None:
    path = make_model("fp8")
    plain = own_logits(load(path), windows)
    change_weights(path, to_fp8)
    change_config(path, quantization_config=FP8)
    capture = record(path, windows, tmp_path, store="logits")
    logits = torch.stack([capture.rows(window, 0, 64) for window in range(windows.count)])
    assert torch.equal(logits, own_logits(load(path), windows)[..., : logits.shape[-1]])
    assert (logits - plain[..., : logits.shape[-1]]).abs().max() > 1e-3
    assert capture.manifest["facts"]["quantization"] == "fp8"


@pytest.mark.parametrize("kind", ["compressed-tensors", "bitsandbytes", "torchao"])
def test_quantized_checkpoints_are_run(kind: str, make_model: MakeModel, windows: Windows, tmp_path: Path) -> None:
    network = quantized(kind, make_model("to-be-quantized"))
    network.save_pretrained(tmp_path / kind)
    capture = record(tmp_path / kind, windows, tmp_path / "cache", store="logits")
    logits = torch.stack([capture.rows(window, 0, 64) for window in range(windows.count)])
    expected = own_logits(network.eval(), windows)[..., : logits.shape[-1]]
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    assert capture.manifest["facts"]["quantization"] == kind


def quantized(kind: str, path: Path) -> Any:
    """Return a model with quantized modules."""
    if kind == "bitsandbytes":
        from transformers import BitsAndBytesConfig

        return load(path, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return load(path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig(version=2)))
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from transformers import CompressedTensorsConfig

    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}
    settings = {"config_groups": {"group_0": group}, "ignore": ["lm_head"], "format": "int-quantized"}
    network: Any = load(path)
    config = QuantizationConfig(**settings, quantization_status="frozen")
    apply_quantization_config(network, config)
    for module in network.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data.copy_(module.weight.detach().abs().amax(1, keepdim=True) / 127)
    ModelCompressor(quantization_config=config).compress_model(network)
    network.save_pretrained(path.parent / "ct")
    change_config(
        path.parent / "ct",
        quantization_config={"quant_method": kind, **settings, "quantization_status": "compressed"},
    )
    return AutoModelForCausalLM.from_pretrained(
        path.parent / "ct", dtype=torch.float32, quantization_config=CompressedTensorsConfig()
    )


@pytest.mark.parametrize(
    ("name", "tensor", "hint"),
    [
        (f"{UP}_scale", torch.ones(1), "scales of a quantization: config.json lacks"),
        ("model.layers.0.self_attn.q_proj.bias", torch.ones(64), "config.json does not describe these weights"),
        ("model.layers.2.mlp.up_proj.weight", torch.ones(128, 64), "config.json does not describe these weights"),
        ("model.layers.0.attn.bias", torch.ones(64), "config.json does not describe these weights"),  # no mask
    ],
)
def test_tensors_that_the_model_has_no_place_for_are_an_error(
    name: str, tensor: Tensor, hint: str, make_model: MakeModel, windows: Windows, tmp_path: Path
) -> None:
    path = make_model("unexpected")
    change_weights(path, lambda weights: weights.update({name: tensor}))
    with pytest.raises(ModelError, match=rf"no place for 1 tensors .*model\.safetensors\): {name}\..*{hint}"):
        record(path, windows, tmp_path)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "mtp.layers.0.mlp.up_proj.weight"])
def test_tensors_that_change_nothing_are_let_pass(
    name: str, make_model: MakeModel, windows: Windows, tmp_path: Path
) -> None:
    from transformers import Qwen3NextConfig

    mtp = Qwen3NextConfig(**TINY, num_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 2)
    path = make_model("harmless", mtp if name.startswith("mtp") else None)
    change_weights(path, lambda weights: weights.update({name: torch.ones(8)}))
    assert record(path, windows, tmp_path).windows == windows.count


def test_the_masks_in_old_checkpoints_of_gpt2_are_let_pass(
    make_model: MakeModel, windows: Windows, tmp_path: Path
) -> None:
    gpt2 = GPT2Config(vocab_size=TINY["vocab_size"], n_embd=64, n_layer=2, n_head=4, n_positions=512)
    path = make_model("gpt2", gpt2)
    mask = torch.ones(512, 512).tril().to(torch.uint8)[None, None]
    masks = {"transformer.h.0.attn.bias": mask, "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}
    change_weights(path, lambda weights: weights.update(masks))
    assert record(path, windows, tmp_path).windows == windows.count


def test_a_checkpoint_that_lost_its_quantization_config_is_refused(
    make_model: MakeModel, windows: Windows, tmp_path: Path
) -> None:
    path = make_model("lost-config")
    change_weights(path, to_fp8)
    with pytest.raises(
        ModelError, match=r"no place for 14 tensors .*weight_scale_inv and 11 more.*quantization_config"
    ):
        record(path, windows, tmp_path)
    change_weights(path, lambda weights: [weights.pop(name) for name in list(weights) if "scale" in name] and None)
    with pytest.raises(ModelError, match=r"model\.safetensors stores 14 tensors as codes of a quantization, .*F8_E4M3"):
        record(path, windows, tmp_path)


def adapted(path: Path) -> Path:
    """Put a LoRA adapter that changes the logits beside a model."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(load(path), config).save_pretrained(path.parent / "adapter")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.move(path.parent / "adapter" / name, path / name)
    return path


def test_an_adapter_beside_the_weights_is_run(make_model: MakeModel, windows: Windows, tmp_path: Path) -> None:
    path = make_model("adapted")
    plain = own_logits(load(path), windows)
    capture = record(adapted(path), windows, tmp_path, store="logits")
    logits = torch.stack([capture.rows(window, 0, 64) for window in range(windows.count)])
    assert (logits - plain[..., : logits.shape[-1]]).abs().max() > 1e-2


def test_an_adapter_on_a_quantized_base_is_run(make_model: MakeModel, windows: Windows, tmp_path: Path) -> None:
    path = adapted(make_model("adapted-plain"))
    base = tmp_path / "adapted-4bit"
    quantized("bitsandbytes", make_model("adapted-base")).save_pretrained(base)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(path / name, base)
    capture = record(base, windows, tmp_path / "cache")
    assert capture.manifest["facts"]["quantization"] == "bitsandbytes"
    change_weights(base, lambda weights: weights.update({f"{UP}_scale": torch.ones(1)}))
    with pytest.raises(ModelError, match="no place for 1 tensors"):
        record(base, windows, tmp_path / "cache-2")


def test_an_adapter_without_its_library_is_refused(make_model: MakeModel) -> None:
    path = adapted(make_model("no-peft"))
    script = f"""
import sys
from importlib.abc import MetaPathFinder
from importlib import metadata, util
from pathlib import Path

find_spec = util.find_spec
util.find_spec = lambda name, *args: None if name == "peft" else find_spec(name, *args)

class NoPeft(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "peft":
            raise ModuleNotFoundError("no peft")

sys.meta_path.insert(0, NoPeft())
from pytest_kld.engines.transformers import TransformersEngine
from pytest_kld.errors import ModelError
from pytest_kld.subjects.model import ModelSpec
from pytest_kld.subjects.subject import Subject
subject = Subject(name="adapted", model=ModelSpec.parse({str(path)!r}, Path()), engine="transformers")
try:
    with TransformersEngine(device="cpu").open(subject) as model:
        print("loaded without it:", type(model.network.model.layers[0].self_attn.q_proj))
except ModelError as error:
    print("refused:", error)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "refused:" in run.stdout, run.stdout + run.stderr
    assert f"{path}/adapter_config.json" in run.stdout
    assert "`peft` is not installed" in run.stdout


@pytest.mark.parametrize("damage", ["base lacks", "base unexpected", "adapter lacks"])
def test_adapter_and_base_are_whole_or_refused(
    damage: str, make_model: MakeModel, windows: Windows, tmp_path: Path
) -> None:
    path = adapted(make_model(f"adapted-{damage}"))
    file = path / ("adapter_model.safetensors" if damage.startswith("adapter") else "model.safetensors")
    weights = load_file(file)
    if damage.endswith("lacks"):
        weights.pop(UP if damage.startswith("base") else min(weights))
    else:
        weights[f"{UP}_scale"] = torch.ones(1)
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of the model's weights|no place for 1 tensors"):
        record(path, windows, tmp_path)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3Config(**TINY, tie_word_embeddings=False))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    return tmp_path / "sharded"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("shard missing", "cannot load .*sharded"),
        ("shard not in the index", "lacks 6 of the model's weights"),
        ("index names too much", r"index\.json names 1 tensors that its files do not hold, e\.g\. model\.norm\.scale"),
        ("a tensor twice", r"model-0.*safetensors and model-0.*safetensors hold different values of model\.embed"),
        ("two checkpoints", r"holds two checkpoints, model\.safetensors and the shards of"),
    ],
)
def test_shards_and_index_that_contradict_each_other_are_refused(
    damage: str, message: str, sharded: Path, reference_dir: Path, windows: Windows, tmp_path: Path
) -> None:
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    shards = sorted(set(index["weight_map"].values()))
    if damage == "shard missing":
        (sharded / shards[-1]).unlink()
    elif damage == "shard not in the index":
        index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if shard != shards[-1]}
    elif damage == "index names too much":
        index["weight_map"]["model.norm.scale"] = shards[0]
    elif damage == "a tensor twice":
        first, last = load_file(sharded / shards[0]), load_file(sharded / shards[-1])
        save_file({**last, min(first): torch.zeros_like(first[min(first)])}, sharded / shards[-1], {"format": "pt"})
    else:
        shutil.copy(reference_dir / "model.safetensors", sharded)
    file.write_text(json.dumps(index))
    with pytest.raises(ModelError, match=message):
        record(sharded, windows, tmp_path)


def test_a_tensor_that_is_in_two_shards_alike_is_let_pass(sharded: Path, windows: Windows, tmp_path: Path) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    save_file({**load_file(shards[0]), **load_file(shards[-1])}, shards[-1], {"format": "pt"})
    assert record(sharded, windows, tmp_path).windows == windows.count


@pytest.mark.parametrize("alike", [True, False])
def test_a_tied_head_that_differs_from_the_embeddings_is_refused(
    alike: bool, make_model: MakeModel, windows: Windows, tmp_path: Path
) -> None:
    path = make_model("tied", Qwen3Config(**TINY, tie_word_embeddings=True))

    def add_head(weights: dict[str, Tensor]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * (1 if alike else 2)

    change_weights(path, add_head)
    if alike:
        assert record(path, windows, tmp_path).windows == windows.count
    else:
        with pytest.raises(ModelError, match=r"tie_word_embeddings.*holds another lm_head\.weight"):
            record(path, windows, tmp_path)


def test_a_model_that_does_not_fit_the_memory_gets_a_hint(reference_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network: Any = load(reference_dir)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(type(network), "to", full)  # no memory can be filled without harm on a CPU
    with pytest.raises(
        ModelError, match=r"does not fit the memory of cuda:0: CUDA out .*`device_map`.*--kld-dtype.*tensor parallelism"
    ):
        move(network, torch.device("cuda:0"), ModelSpec.parse(str(reference_dir), Path()))
