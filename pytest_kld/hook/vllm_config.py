"""What vLLM's configuration says of a running server: the settings that may change what it computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from typing import Any

_SECTIONS_LEFT_OUT = {
    "observability_config": "what is measured and printed",
    "logging_config": "what is printed",
    "profiler_config": "what is measured",
    "structured_outputs_config": "which tokens may be sampled",
    "kv_events_config": "what is told to other processes",
    "weight_transfer_config": "how weights are replaced while it runs",
}
"""Sections of `VllmConfig` that move no logit of a prompt, each with the reason."""
_LEFT_OUT = {
    "instance_id": "vLLM draws it at each start",
    "shutdown_timeout": "how it ends",
    "model_config.hf_token": "a secret",
    "model_config.seed": "a prefill samples nothing that is kept",
    "model_config.served_model_name": "a name",
    "cache_config.num_gpu_blocks": "the cache's capacity, derived from the free memory at start-up",
    "cache_config.num_cpu_blocks": "the cache's capacity",
    "cache_config.kv_cache_size_tokens": "the cache's capacity",
    "cache_config.kv_cache_max_concurrency": "the cache's capacity",
    "load_config.download_dir": "where the weights are stored",
    "load_config.use_tqdm_on_load": "what is printed",
    "compilation_config.cache_dir": "where compiled kernels are kept",
    "compilation_config.local_cache_dir": "where compiled kernels are kept",
    "compilation_config.debug_dump_path": "what is written for debugging",
    "compilation_config.compilation_time": "how long it took",
    "compilation_config.encoder_compilation_time": "how long it took",
    "compilation_config.static_forward_context": "its layers, as objects",
    "compilation_config.static_all_moe_layers": "its layers, by name",
    "compilation_config.bs_to_padded_graph_size": "derived from the sizes of its graphs",
    "compilation_config.traced_files": "what was compiled",
    "compilation_config.enabled_custom_ops": "what was compiled",
    "compilation_config.disabled_custom_ops": "what was compiled",
}
"""Settings that move no logit, each with the reason; every other setting counts."""
_PARTS_LEFT_OUT = ("port", "address", "_addr", "_ip", "socket", "timeout", "handle", "_rank", ".rank")
"""Parts of names of settings of the parallel configuration that say where processes are, not what they compute."""


def plain_settings(config: Any) -> dict[str, Any]:
    """Return the settings that differ from vLLM's defaults and may change a number, as JSON, by `section.name`.

    Args:
        config: a `VllmConfig`.

    """
    return dict(sorted(_settings(config)))


def _settings(config: Any) -> Iterator[tuple[str, Any]]:
    for section in fields(config):
        value = getattr(config, section.name)
        if section.name in _SECTIONS_LEFT_OUT:
            continue
        if not is_dataclass(value):
            if section.name not in _LEFT_OUT and value is not None:
                yield section.name, _plain(value) if _is_plain(value) else type(value).__name__
            continue
        for one in fields(value):
            name = f"{section.name}.{one.name}"
            if name in _LEFT_OUT or (
                section.name == "parallel_config" and any(part in name for part in _PARTS_LEFT_OUT)
            ):
                continue
            found = getattr(value, one.name, None)
            if _is_plain(found) and _plain(found) != _plain(_default(one)):
                yield name, _plain(found)


def _default(one: Any) -> Any:
    default = one.default
    if hasattr(default, "default_factory") or hasattr(default, "get_default"):  # pydantic's
        default = default.get_default(call_default_factory=True)
    if default is MISSING and one.default_factory is not MISSING:
        return one.default_factory()
    return None if default is MISSING else default


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, str | int | float | bool | Enum) or type(value).__module__ == "torch"


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in sorted(value.items(), key=lambda pair: str(pair[0]))}
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
