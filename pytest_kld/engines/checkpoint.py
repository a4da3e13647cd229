"""What a checkpoint's config says, before its weights are loaded."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig

from pytest_kld.engines import ModelFacts
from pytest_kld.engines.quantized import declared, method_of
from pytest_kld.errors import ModelError
from pytest_kld.hook.experts import experts_of, experts_per_token_of
from pytest_kld.subjects.model import advice

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from pytest_kld.subjects.model import ModelSpec


def read_facts(model: ModelSpec, *, dtype: str, trust_remote_code: bool) -> ModelFacts:
    """Read a model's facts from its config.

    Args:
        model: the pinned model.
        dtype: the dtype to load the model in; `auto` is the checkpoint's own.
        trust_remote_code: whether a repository's own code may run.

    Raises:
        ModelError: the config is missing or cannot be read.

    """
    return facts_of(read_config(model, trust_remote_code=trust_remote_code), None if dtype == "auto" else dtype)


def read_config(model: ModelSpec, *, trust_remote_code: bool) -> PretrainedConfig:
    """Read a model's config.

    Raises:
        ModelError: the config is missing or cannot be read.

    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            model.source, revision=model.revision or "main", trust_remote_code=trust_remote_code
        )
    except Exception as error:  # a config file can raise any exception, depending on its contents
        raise ModelError(f"cannot read the config of {model.label}: {error}{advice(error)}") from error
    return config


def facts_of(config: PretrainedConfig, dtype: str | None, quantization: Any = None) -> ModelFacts:
    """Return the facts that a config holds.

    Args:
        config: the config of the checkpoint or of the loaded model.
        dtype: the dtype that the model is loaded in; None means the config's own.
        quantization: what an argument declares; the config's own takes precedence, as in transformers.

    """
    text = config.get_text_config()
    return ModelFacts(
        model_class=(config.architectures or [type(config).__name__])[0],
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        context_length=getattr(text, "max_position_embeddings", None),
        dtype=dtype or str(text.dtype or config.dtype or torch.float32).removeprefix("torch."),
        quantization=method_of(declared(config) or quantization),
        experts=experts_of(text),
        experts_per_token=experts_per_token_of(text),
        layers=getattr(text, "num_hidden_layers", None),
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
