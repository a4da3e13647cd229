"""What a checkpoint's config says, before its weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig

from pytest_kld.engines import ModelFacts
from pytest_kld.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from pytest_kld.subjects.model import ModelSpec


def read_facts(model: ModelSpec, *, dtype: str, trust_remote_code: bool, arguments: Mapping[str, Any]) -> ModelFacts:
    """Read a model's facts from its config.

    Args:
        model: the pinned model.
        dtype: what it will be loaded in; `auto` is the checkpoint's own.
        trust_remote_code: whether a repository's own code may run.
        arguments: the engine's; a `quantization_config` among them takes the place of the config's.

    Raises:
        ModelError: there is no config, or it cannot be read.

    """
    try:
        config = AutoConfig.from_pretrained(
            model.source, revision=model.revision or "main", trust_remote_code=trust_remote_code
        )
    except Exception as error:  # config files raise whatever they contain
        raise ModelError(f"cannot read the config of {model.label}: {error}") from error
    return facts_of(config, None if dtype == "auto" else dtype, arguments)


def facts_of(config: PretrainedConfig, dtype: str | None, arguments: Mapping[str, Any]) -> ModelFacts:
    """Return the facts that a config holds."""
    text = config.get_text_config()
    quantization = arguments.get("quantization_config") or getattr(config, "quantization_config", None)
    if isinstance(quantization, dict):
        method = quantization.get("quant_method", "unknown")
    else:
        method = getattr(quantization, "quant_method", None)
    return ModelFacts(
        model_class=(config.architectures or [type(config).__name__])[0],
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        context_length=getattr(text, "max_position_embeddings", None),
        dtype=dtype or str(text.dtype or config.dtype or torch.float32).removeprefix("torch."),
        quantization=None if method is None else str(getattr(method, "value", method)),
    )


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
