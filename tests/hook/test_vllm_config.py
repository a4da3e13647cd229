"""What a running vLLM tells of itself: the settings that may change a number, and why it is refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pytest_kld.hook.vllm import _refusal
from pytest_kld.hook.vllm_config import plain_settings
from pytest_kld.hook.vllm_requests import external_id


class Level(Enum):
    O2 = 2


@dataclass
class Model:
    dtype: Any = "auto"
    max_model_len: int = 0
    hf_token: str | None = None
    hf_overrides: dict[str, Any] = field(default_factory=dict)
    seed: int = 0


@dataclass
class Parallel:
    tensor_parallel_size: int = 1
    master_port: int = 0
    data_parallel_rank: int = 0


@dataclass
class Observability:
    traces: str | None = None


@dataclass
class Config:
    """In the form of `VllmConfig`."""

    model_config: Model
    parallel_config: Parallel
    observability_config: Observability
    lora_config: Any = None
    optimization_level: Level = Level.O2
    instance_id: str = "drawn"


def settings(**changed: Any) -> dict[str, Any]:
    model = Model(**{name: value for name, value in changed.items() if hasattr(Model, name) or name == "hf_overrides"})
    parallel = Parallel(**{name: value for name, value in changed.items() if hasattr(Parallel, name)})
    return plain_settings(Config(model, parallel, Observability(traces=changed.get("traces"))))


def test_settings_that_are_not_the_default_are_told() -> None:
    assert settings() == {"optimization_level": "O2"}
    changed = settings(dtype=torch.bfloat16, tensor_parallel_size=2, hf_overrides={"head_dtype": "float32"})
    assert changed == {
        "model_config.dtype": "torch.bfloat16",
        "model_config.hf_overrides": {"head_dtype": "float32"},
        "optimization_level": "O2",
        "parallel_config.tensor_parallel_size": 2,
    }


@pytest.mark.parametrize(
    "changed", [{"hf_token": "secret"}, {"seed": 7}, {"master_port": 9}, {"data_parallel_rank": 1}, {"traces": "there"}]
)
def test_secrets_addresses_and_what_is_printed_are_not(changed: dict[str, Any]) -> None:
    assert settings(**changed) == settings()


@pytest.mark.parametrize("name", ["data_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size"])
def test_ways_to_be_parallel_that_no_test_has_shown_are_refused(name: str) -> None:
    parallel = {
        "tensor_parallel_size": 2,
        "data_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "prefill_context_parallel_size": 1,
    }
    assert _refusal(SimpleNamespace(**parallel)) is None
    assert f"it runs with {name} = 2" in str(_refusal(SimpleNamespace(**{**parallel, name: 2})))


def test_a_worker_s_name_for_a_request_holds_the_client_s() -> None:
    rid = f"pytest-kld:{'0' * 32}:7"
    assert external_id(f"cmpl-{rid}-0-1a2b3c4d") == rid
    assert external_id(f"cmpl-{rid}-0-12345678") == rid
    assert external_id(f"cmpl-{rid}-0") == rid
    assert external_id(f"cmpl-{rid}-2-12345678") == rid[:-1] + "9"
    for other in (f"cmpl-{rid}-1-1a2b3c4d", f"chatcmpl-{rid}-0", "cmpl-x-0-123"):
        assert external_id(other) != rid
