"""The embedded engine: transformers, in this process, on CPU or CUDA."""

from __future__ import annotations

import gc
import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from pytest_kld.engines import ModelFacts, Prefill
from pytest_kld.engines.checkpoint import facts_of, read_facts, versions
from pytest_kld.errors import CaptureError, ModelError
from pytest_kld.kernel.device import pick_device
from pytest_kld.kernel.head import Head
from pytest_kld.servers.environment import numeric_environment
from pytest_kld.subjects.subject import as_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from transformers import PreTrainedModel

    from pytest_kld.subjects.model import ModelSpec
    from pytest_kld.subjects.subject import Subject
    from pytest_kld.text.windows import Windows

_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")
"""Config fields of a factor on the logits; some architectures multiply by theirs and some divide."""
_SOFTCAP = "final_logit_softcapping"
_QUANTIZERS = ("accelerate", "bitsandbytes", "compressed-tensors", "optimum-quanto", "torchao")


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformersEngine:
    """Loads checkpoints as `AutoModelForCausalLM` does, quantized ones included.

    Attributes:
        dtype: `auto` (the checkpoint's) or a torch dtype's name.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        trust_remote_code: whether a repository's own code may run.

    """

    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False

    def facts(self, subject: Subject) -> ModelFacts:
        """Read a model's facts from its config. See `Engine.facts`."""
        return read_facts(
            subject.spec, dtype=self.dtype, trust_remote_code=self.trust_remote_code, arguments=subject.arguments
        )

    def fingerprint(self, subject: Subject) -> dict[str, Any]:
        """Return versions, every setting, arguments and environment. See `Engine.fingerprint`."""
        device = pick_device(self.device)
        quantized = self.facts(subject).quantization is not None
        return {
            "engine": "transformers",
            "versions": versions("transformers", "torch", *(_QUANTIZERS if quantized else ())),
            "dtype": self.dtype,
            "trust_remote_code": self.trust_remote_code,
            "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
            "arguments": as_json(subject.arguments),
            "environment": numeric_environment(os.environ),
        }

    @contextmanager
    def open(self, subject: Subject) -> Iterator[LoadedTransformer]:
        """Load a model and free it at the end. See `Engine.open`."""
        device = pick_device(self.device)
        loaded = None
        try:
            loaded = LoadedTransformer(self._load(subject.spec, subject.arguments, device), subject.label)
            yield loaded
        finally:
            if loaded is not None:
                loaded.close()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()

    def close(self) -> None:
        """Do nothing: models go when their context ends."""

    def _load(self, model: ModelSpec, arguments: Mapping[str, Any], device: torch.device) -> PreTrainedModel:
        dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        options = {"dtype": dtype, "trust_remote_code": self.trust_remote_code, **arguments}
        if model.revision:
            options["revision"] = model.revision
        load: Any = AutoModelForCausalLM.from_pretrained
        network: PreTrainedModel
        try:
            with _no_progress_bar():
                network, info = load(model.source, output_loading_info=True, **options)
        except Exception as error:  # loaders, quantizers and remote code raise whatever they like
            raise ModelError(f"transformers cannot load {model.label}: {type(error).__name__}: {error}") from error
        if lacking := [*info["missing_keys"], *info["mismatched_keys"]]:
            raise ModelError(  # transformers only warns, and fills them with random numbers
                f"{model.label}: the checkpoint lacks {len(lacking)} of the model's weights or has them in another "
                f"shape, e.g. {lacking[0]}. It is incomplete, or transformers does not support its format."
            )
        if device.type != "cpu" and "device_map" not in options:
            network.to(device)  # type: ignore[arg-type]
        network.eval()
        return network


@dataclass(slots=True)
class LoadedTransformer:
    """A loaded model whose head module is watched."""

    network: PreTrainedModel | None
    label: str
    _seen: list[Tensor] = field(default_factory=list)

    @property
    def facts(self) -> ModelFacts:
        """What the model turned out to be."""
        network = self._loaded
        return facts_of(network.config, str(network.dtype).removeprefix("torch."), {})

    @property
    def heads(self) -> list[Head]:
        """What its head may be: a plain linear one, with each reading of the config's transforms."""
        module, config = self._loaded.get_output_embeddings(), self._loaded.config.get_text_config()
        weight = getattr(module, "weight", None)
        if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.dim() != 2:
            return []
        factors = [float(value) for name in _SCALES if (value := getattr(config, name, None))]
        scales = [*factors, *(1 / factor for factor in factors), 1.0]
        softcap = getattr(config, _SOFTCAP, None)
        bias = getattr(module, "bias", None)
        return [
            Head(weight=weight.detach(), bias=None if bias is None else bias.detach(), scale=scale, softcap=cap)
            for cap, scale in product([softcap, None] if softcap else [None], scales)
        ]

    @torch.inference_mode()
    def prefill(self, windows: Windows, indices: Sequence[int], rows: Sequence[int] | None) -> Iterator[Prefill]:
        """Run windows one by one. See `LoadedModel.prefill`."""
        network = self._loaded
        head = network.get_output_embeddings()
        selected = None if rows is None else torch.tensor(rows)
        hook = _watch(head, self._seen, selected) if isinstance(head, nn.Module) else None
        try:
            for index in indices:
                self._seen.clear()
                ids = torch.from_numpy(windows.token_ids[index]).long()[None].to(network.device)
                try:
                    logits = network(input_ids=ids, use_cache=False).logits[0]
                except Exception as error:  # out of memory, kernels that are not there, remote code
                    raise CaptureError(
                        f"{self.label}, window {index}: the forward pass failed: {type(error).__name__}: {error}"
                    ) from error
                # A head that runs more than once (speculative layers) or not at all is not understood here.
                hidden = self._seen[0] if len(self._seen) == 1 else None
                if selected is not None and len(logits) == windows.size:
                    logits = logits[selected.to(logits.device)]
                yield Prefill(window=index, hidden=hidden, logits=logits)
        finally:
            self._seen.clear()
            if hook is not None:
                hook.remove()

    def close(self) -> None:
        """Let go of the model."""
        self._seen.clear()
        self.network = None

    @property
    def _loaded(self) -> PreTrainedModel:
        if self.network is None:
            raise ModelError(f"{self.label} is closed")
        return self.network


def _watch(head: nn.Module, seen: list[Tensor], rows: Tensor | None) -> Any:
    """Note what goes into the head; let only the wanted rows through, so that it computes no others."""

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0]
        seen.append(hidden[0])
        if rows is None or int(rows.max()) >= hidden.shape[1]:  # another use of the head, not the prefill's
            return None
        return (hidden[:, rows.to(hidden.device)], *args[1:])

    return head.register_forward_pre_hook(before)


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
