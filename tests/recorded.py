"""Captures of tiny models, recorded as the plugin does it, and logits of the same windows from transformers alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from pytest_kld.captures.cache import Cache
from pytest_kld.captures.capture import Capture
from pytest_kld.captures.recording import Recording
from pytest_kld.engines.transformers import TransformersEngine
from pytest_kld.progress import Silent
from pytest_kld.subjects.model import ModelSpec
from pytest_kld.subjects.subject import Subject

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

    from pytest_kld.captures.capture import Store
    from pytest_kld.text.windows import Windows


@dataclass(frozen=True, slots=True, kw_only=True)
class AlteredEngine(TransformersEngine):
    """The engine, with a change made to each model after it is loaded."""

    alter: Callable[[Any], Any]

    def _load(self, *args: Any) -> Any:
        return self.alter(TransformersEngine._load(self, *args))


def transformers_subject(model: Path, **arguments: Any) -> Subject:
    """Return a model as transformers runs it."""
    spec = ModelSpec.parse(str(model), Path())
    return Subject(name=spec.label, model=spec, engine="transformers", arguments=arguments)


def record(
    model: Path,
    windows: Windows,
    cache_dir: Path,
    *,
    store: Store = "auto",
    dtype: str = "float32",
    arguments: Mapping[str, Any] | None = None,
    alter: Callable[[Any], Any] | None = None,
) -> Capture:
    """Capture a model into its own cache."""
    options = {"dtype": dtype, "device": "cpu"}
    recording = Recording(
        engine=TransformersEngine(**options) if alter is None else AlteredEngine(**options, alter=alter),
        subject=transformers_subject(model, **(arguments or {})),
        windows=windows,
        store=store,
        key={"model": str(model), "store": store, "dtype": dtype},
    )
    cache = Cache(cache_dir)
    entry = cache.capture_entry(recording.key)
    recording.run(cache, entry, Silent())
    return Capture.open(entry, windows)


def load(model: Path, dtype: str = "float32", **arguments: Any) -> nn.Module:
    """Load a model with transformers alone."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), **arguments).eval()


@torch.inference_mode()
def own_logits(network: Any, windows: Windows) -> Tensor:
    """Return the logits [windows, N, V] that a model gives, in its dtype."""
    return torch.cat([network(input_ids=ids[None]).logits for ids in torch.from_numpy(windows.token_ids).long()])
