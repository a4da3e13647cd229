"""Quantized checkpoints: what a config declares, whether transformers can run it, and whether it did so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from pytest_kld.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PretrainedConfig, PreTrainedModel

    from pytest_kld.engines.stored import StoredTensor

_BITSANDBYTES = "bitsandbytes"
_OTHER_KEYS = ("compression_config",)
"""Fields that declare a quantization to other loaders but that transformers does not read."""


def declared(config: PretrainedConfig) -> Any:
    """Return the quantization that a config declares, as a dict or a transformers object; None if it has none."""
    return getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )


def method_of(quantization: Any) -> str | None:
    """Return the name of a quantization's method, e.g. `bitsandbytes`, or None."""
    if isinstance(quantization, dict):
        if quantization.get("load_in_4bit") or quantization.get("load_in_8bit"):
            return _BITSANDBYTES
        method = quantization.get("quant_method", "unknown")
        if method == _BITSANDBYTES:  # transformers rejects it unless one of the two is set
            method = "bitsandbytes without load_in_4bit or load_in_8bit"
    else:
        method = getattr(quantization, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def require_supported(config: PretrainedConfig, where: str, arguments: Mapping[str, Any]) -> None:
    """Refuse a config whose quantization transformers would skip.

    Args:
        config: the checkpoint's config.
        where: the config's file, for messages.
        arguments: keyword arguments of `from_pretrained`.

    Raises:
        ModelError: this version of transformers does not know the method and would run the plain weights; or the
            argument `quantization_config` contradicts the config, which takes precedence.

    """
    quantization = declared(config)
    for key in _OTHER_KEYS:
        if quantization is None and getattr(config, key, None):
            raise ModelError(
                f"{where} declares a quantization as `{key}`, which transformers ignores: it would run the weights as "
                "they are. Rename it to `quantization_config`."
            )
    method = method_of(quantization)
    if method is None:
        return
    if method != _BITSANDBYTES and method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        known = {name for name in AUTO_QUANTIZATION_CONFIG_MAPPING if not name.startswith(_BITSANDBYTES)}
        raise ModelError(
            f"{where} declares quant_method {method!r}, which this version of transformers does not know: it "
            f"would run the weights without it. It supports {', '.join(sorted(known | {_BITSANDBYTES}))}. Use another "
            "version of transformers, or --kld-engine=sglang or vllm."
        )
    given = arguments.get("quantization_config")
    if given is None:
        return
    if method_of(given) != method or (not hasattr(given, "get_loading_attributes") and not _agree(given, quantization)):
        raise ModelError(
            f"{where} declares quant_method {method!r}, and the argument `quantization_config` ({method_of(given)}) "
            "contradicts it: transformers would ignore the argument. Leave it out, or give it with the unquantized "
            "model."
        )


def require_quantized(
    network: PreTrainedModel, method: str, label: str, stored: Mapping[str, StoredTensor] | None, *, gguf: bool
) -> None:
    """Refuse a model that is declared to be quantized and is not.

    transformers dequantizes some formats when it loads them (fp8 and mxfp4 without their kernels, GGUF,
    `dequantize=True`): the weights have the quantized values in a wide dtype. It then drops its quantizer, so only the
    files remain as evidence: they must hold quantized tensors, and the caller has refused tensors that were not used.

    Args:
        network: the loaded model.
        method: the quantization's name.
        label: the model's name for messages.
        stored: the tensors in the checkpoint's files; None if unknown.
        gguf: whether the checkpoint is a GGUF file, in which each tensor's dtype is its quantization.

    Raises:
        ModelError: no module is quantized, or plain weights were "dequantized".

    """
    if getattr(network, "hf_quantizer", None) is not None:
        if not any(_is_quantized(module) for module in network.modules()):
            raise ModelError(
                f"{label} is said to be quantized ({method}), and after loading not one of its modules is: the plain "
                "weights would be measured. Check what the quantization config leaves out, and whether the files hold "
                "quantized weights."
            )
    elif not gguf and not any(tensor.is_packed(name) or "scale" in name for name, tensor in (stored or {}).items()):
        raise ModelError(
            f"{label} is said to be quantized ({method}), and its files hold plain weights only"
            + (" as far as can be seen (they are no safetensors)" if stored is None else "")
            + ". Remove `quantization_config` from its config.json if they are already rounded."
        )


def require_plain(stored: Mapping[str, StoredTensor], label: str) -> None:
    """Refuse quantized tensors that no config declares: transformers would load them as if they were plain weights.

    Raises:
        ModelError: there are tensors of at most 8 bits, or weights of integers.

    """
    packed = [name for name, tensor in stored.items() if tensor.is_packed(name)]
    if packed:
        first = stored[packed[0]]
        raise ModelError(
            f"{label}: {first.file} stores {len(packed)} tensors as codes of a quantization, e.g. {packed[0]} "
            f"({first.dtype}), and config.json declares none: transformers would use them as plain weights. Restore "
            "its `quantization_config`, or store the weights in a dtype of 16 bits or more."
        )


def _is_quantized(module: nn.Module) -> bool:
    if getattr(module, "quantization_status", None) is not None:  # compressed-tensors; its weights may be plain
        return True
    return any(_holds_codes(tensor) for tensor in _tensors(module))


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    # Integer buffers are common in plain models (positions, masks); a quantization's codes have at most 8 bits,
    # or are packed into a matrix under one of these names.
    for name, buffer in module.named_buffers(recurse=False):
        if (buffer.element_size() == 1 and buffer.dtype != torch.bool and buffer.dim() > 1) or name in (
            "qweight",
            "weight_packed",
        ):
            yield buffer


def _holds_codes(tensor: Tensor) -> bool:
    if getattr(tensor, "quant_state", None) is not None:  # bitsandbytes; its codes may be stored as bfloat16
        return True
    if type(tensor).__module__.partition(".")[0] not in ("torch", "bitsandbytes"):  # tensors of torchao or quanto
        return True
    return tensor.element_size() == 1 or not (tensor.is_floating_point() or tensor.is_complex())


def _agree(given: Any, quantization: Any) -> bool:
    theirs = quantization if isinstance(quantization, dict) else quantization.to_dict()
    ours = given if isinstance(given, dict) else given.to_dict()
    return all(ours.get(name) == value for name, value in theirs.items() if not name.startswith("_"))
