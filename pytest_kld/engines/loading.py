"""Loading a checkpoint with transformers: what it drops, replaces or skips with a warning is an error here."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging
from transformers.utils.import_utils import is_accelerate_available, is_peft_available
from transformers.utils.peft_utils import find_adapter_config_file

from pytest_kld.engines.quantized import require_plain, require_quantized
from pytest_kld.engines.stored import read_stored
from pytest_kld.errors import KLDError, ModelError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from transformers import PreTrainedModel

    from pytest_kld.engines.stored import StoredTensor
    from pytest_kld.subjects.model import ModelSpec

_HARMLESS = (
    r"(^|\.)rotary_emb\.inv_freq$",  # computed from the config; old checkpoints store it for each layer
    r"(^|\.)attn\.masked_bias$",  # the constant that old versions of GPT-2 and related models wrote into masked scores
)
"""Tensors without a place in the model that change nothing. Before this check, transformers already drops the names
that a class itself declares, such as the layers of multi-token prediction."""
_CAUSAL_MASK = re.compile(r"(^|\.)attn\.bias$")
"""Old versions of GPT-2 and related models saved their causal mask, [1, 1, N, N], under this name."""
_NO_ADAPTER = {"subfolder": ".no-adapter"}
"""A folder that does not exist, so that transformers finds no adapter."""


def load_network(
    model: ModelSpec, options: Mapping[str, Any], device: torch.device, quantization: str | None
) -> PreTrainedModel:
    """Load a checkpoint as `AutoModelForCausalLM` does, whole or not at all.

    Args:
        model: the pinned model.
        options: keyword arguments of `from_pretrained`.
        device: where to put the model, unless the options have a `device_map`.
        quantization: the method that the config or the options declare, or None.

    Returns:
        The model in evaluation mode; an adapter in its directory is active.

    Raises:
        ModelError: the model does not load or does not fit in memory; tensors are missing or unused, or have another
            shape; the model is not quantized as declared, or not in the requested dtype; its files contradict each
            other.

    """
    options = dict(options)
    if model.revision:
        options["revision"] = model.revision
    placed = options.get("device_map") is not None
    if quantization and not placed and device.type != "cpu" and is_accelerate_available():
        options["device_map"] = {"": device}  # several quantizers refuse to move what they have quantized
        placed = True
    try:
        with _no_progress_bar():
            if has_adapter(model, options):
                _check_base(model, options, quantization)
            network, info = _from_pretrained(model, options)
    except KLDError:
        raise
    except torch.OutOfMemoryError as error:
        raise _too_large(model, device, error) from error
    except Exception as error:  # loaders, quantizers and remote code may raise any exception
        raise ModelError(f"transformers cannot load {model.label}: {type(error).__name__}: {error}") from error
    stored = read_stored(model, options)
    _require_complete(info, model, stored)
    if quantization:
        require_quantized(network, quantization, model.label, stored, gguf=bool(options.get("gguf_file")))
    else:
        require_plain({name: one for name, one in (stored or {}).items() if not _is_harmless(name, one)}, model.label)
    _require_dtype(network, options, model.label)
    if not has_adapter(model, options):  # an adapter may bring a head of its own
        _require_one_head(network, model.label, stored)
    if not placed and device.type != "cpu":
        move(network, device, model)
    network.eval()
    return network


def move(network: PreTrainedModel, device: torch.device, model: ModelSpec) -> None:
    """Move a model to a device.

    Raises:
        ModelError: the model does not fit on the device, or cannot be moved.

    """
    try:
        network.to(device)  # type: ignore[arg-type]
    except torch.OutOfMemoryError as error:
        raise _too_large(model, device, error) from error
    except Exception as error:  # some quantizers refuse to move, and drivers fail
        raise ModelError(f"{model.label} cannot be moved to {device}: {type(error).__name__}: {error}") from error


def has_adapter(model: ModelSpec, options: Mapping[str, Any]) -> bool:
    """Tell whether the model's weights come with an adapter, which transformers would load with them.

    Raises:
        ModelError: there is one, but the library `peft` is not installed: transformers would ignore the adapter.

    """
    if model.path is not None:
        found = find_adapter_config_file(model.source, subfolder=options.get("subfolder") or "")
    else:
        found = find_adapter_config_file(model.source, revision=model.revision, cache_dir=options.get("cache_dir"))
    if found is None:
        return False
    if not is_peft_available():
        raise ModelError(
            f"{model.label} has an adapter ({found}), and `peft` is not installed: transformers would run the model "
            "without it. Install peft, or remove the adapter's files if the weights have it merged."
        )
    return True


def _from_pretrained(model: ModelSpec, options: Mapping[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
    load: Any = AutoModelForCausalLM.from_pretrained
    network, info = load(model.source, output_loading_info=True, **options)
    return network, info


def _check_base(model: ModelSpec, options: Mapping[str, Any], quantization: str | None) -> None:
    """Load the base model of an adapter by itself, since a model with an adapter reports only the adapter's loading.

    This takes no memory unless the base is quantized: quantizers need the values.
    """
    place = {} if quantization else {"device_map": {"": "meta"}}
    base = {**options, "adapter_kwargs": _NO_ADAPTER, **place}
    _, info = _from_pretrained(model, base)
    _require_complete(info, model, read_stored(model, options))


def _require_complete(
    info: Mapping[str, Collection[Any]], model: ModelSpec, stored: Mapping[str, StoredTensor] | None
) -> None:
    """Refuse a checkpoint that does not have exactly the model's tensors."""
    label = model.label
    mismatched = [name if isinstance(name, str) else name[0] for name in info["mismatched_keys"]]
    if lacking := sorted([*info["missing_keys"], *mismatched]):
        raise ModelError(  # transformers only warns, and fills them with random numbers
            f"{label}: the checkpoint lacks {len(lacking)} of the model's weights or has them in another "
            f"shape, e.g. {lacking[0]}. It is incomplete, or transformers does not support its format."
        )
    stored = stored or {}
    unused = sorted(name for name in info["unexpected_keys"] if not _is_harmless(name, stored.get(name)))
    if unused:  # transformers only warns, and runs the model without them
        file = stored[unused[0]].file if unused[0] in stored else label
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        scales = any("scale" in name.rsplit(".", 1)[-1] for name in unused)
        raise ModelError(
            f"{label}: the model has no place for {len(unused)} tensors of the checkpoint ({file}): "
            f"{', '.join(unused[:3])}{more}. transformers would run it without them. "
            + (
                "They are scales of a quantization: config.json lacks the `quantization_config` that uses them, or "
                "transformers does not support its format."
                if scales
                else "config.json does not describe these weights, or transformers does not support the architecture."
            )
        )


def _is_harmless(name: str, tensor: StoredTensor | None) -> bool:
    if any(re.search(pattern, name) for pattern in _HARMLESS):
        return True
    if tensor is None or len(tensor.shape) != 4 or not _CAUSAL_MASK.search(name):
        return False
    return tensor.shape[:2] == (1, 1) and tensor.shape[2] == tensor.shape[3]


def _require_dtype(network: PreTrainedModel, options: Mapping[str, Any], label: str) -> None:
    """Refuse a model that is not in the requested dtype; some quantizers choose their own and only warn."""
    asked = options.get("torch_dtype") or options.get("dtype")
    if isinstance(asked, str):
        asked = getattr(torch, asked, None)
    if isinstance(asked, torch.dtype) and network.dtype != asked:
        raise ModelError(
            f"{label} was to be loaded in {asked} and is in {network.dtype}: its quantization does not support "
            f"{asked}. Give --kld-dtype=auto or --kld-dtype={str(network.dtype).removeprefix('torch.')}."
        )


def _require_one_head(network: PreTrainedModel, label: str, stored: Mapping[str, StoredTensor] | None) -> None:
    """Refuse a checkpoint whose config ties the head to the embeddings and that holds another head.

    In that case transformers takes the head from the file, and its version 4 and other engines take the embeddings.
    """
    head, embeddings = network.get_output_embeddings(), network.get_input_embeddings()
    if not network.config.get_text_config().tie_word_embeddings or not type(network)._tied_weights_keys:
        return
    if head is embeddings:
        return
    modules = dict(network.named_modules())
    head_name, embeddings_name = (
        next((f"{name}.weight" for name, found in modules.items() if found is module), "")
        for module in (head, embeddings)
    )
    stored = stored or {}
    if head_name not in stored:
        return
    one, other = getattr(head, "weight", None), getattr(embeddings, "weight", None)
    if one is other and embeddings_name in stored:  # transformers may have replaced the file's head
        one, other = (stored[name].read(name) for name in (head_name, embeddings_name))
    if one is None or other is None or one is other or one.is_meta or other.is_meta or one.shape != other.shape:
        return
    if not torch.equal(one, other.to(one.device)):
        raise ModelError(
            f"{label}: config.json says that the head is the embedding matrix (tie_word_embeddings), and the "
            f"checkpoint holds another {head_name}. Loaders differ in which one they take: correct config.json "
            "or the file."
        )


def _too_large(model: ModelSpec, device: torch.device, error: Exception) -> ModelError:
    return ModelError(
        f"{model.label} does not fit the memory of {device}: {error}. Spread it over several GPUs or the CPU with "
        '`device_map` ({"device_map": "auto"} in kld_reference_args or kld_candidate_args), give a smaller '
        "--kld-dtype, or run it on servers (--kld-engine=sglang or vllm) with tensor parallelism."
    )


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Silence transformers' own bar, which pytest would capture and show with a failure."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
