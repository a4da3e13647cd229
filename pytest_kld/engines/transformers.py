"""The embedded engine: transformers, in this process, on CPU or CUDA."""

from __future__ import annotations

import gc
import os
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pytest_kld.engines import ModelFacts, Prefill, Routing
from pytest_kld.engines.checkpoint import facts_of, read_config, versions
from pytest_kld.engines.loading import has_adapter, load_network
from pytest_kld.engines.quantized import require_supported
from pytest_kld.engines.routes import RouteWatch
from pytest_kld.errors import CaptureError, KLDError, ModelError
from pytest_kld.kernel.device import describe_device, pick_device
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
"""Config fields for a factor on the logits; some architectures multiply by it and some divide."""
_SOFTCAP = "final_logit_softcapping"
_QUANTIZERS = ("bitsandbytes", "compressed-tensors", "gptqmodel", "hqq", "optimum-quanto", "torchao")
_KERNELS = (
    "accelerate",
    "causal-conv1d",
    "flash-attn",
    "flash-linear-attention",
    "kernels",
    "mamba-ssm",
    "peft",
    "triton",
)
"""Packages that transformers uses automatically if they are installed: attention, recurrent layers, adapters."""
_NOT_IN_KEY = {
    "device",  # the key names the actual device: `auto` and `cpu` may be the same
}
"""Settings of the engine that its fingerprint omits, each with the reason."""


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
        """Read a model's facts from its config, and refuse what transformers would skip. See `Engine.facts`."""
        model, arguments = subject.spec, subject.arguments
        if model.path is None and "revision" in arguments:
            raise ModelError(f"{model.label}: name the revision with the model (ORG/NAME@REVISION), not as an argument")
        config = read_config(model, trust_remote_code=arguments.get("trust_remote_code", self.trust_remote_code))
        where = str(model.path / "config.json") if model.path else f"the config.json of {model.label}"
        require_supported(config, where, arguments)
        has_adapter(model, arguments)
        return facts_of(config, self._dtype_name(arguments), _quantization(arguments))

    def fingerprint(self, subject: Subject) -> dict[str, Any]:
        """Return versions, devices, every setting, the arguments and the environment. See `Engine.fingerprint`."""
        device = pick_device(self.device)
        spread = device.type == "cuda" and subject.arguments.get("device_map") is not None
        devices = [torch.device("cuda", n) for n in range(torch.cuda.device_count())] if spread else [device]
        cache = getattr(subject.arguments.get("generation_config"), "cache_implementation", None)
        quantized = self.facts(subject).quantization is not None or cache == "quantized"
        settings = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in _NOT_IN_KEY}
        return {
            "engine": "transformers",
            "versions": versions("transformers", "torch", *_KERNELS, *(_QUANTIZERS if quantized else ())),
            "devices": [describe_device(one) for one in devices],
            **{name: as_json(value) for name, value in settings.items()},
            "arguments": as_json(subject.arguments),
            "environment": numeric_environment(os.environ),
        }

    @contextmanager
    def open(self, subject: Subject) -> Iterator[LoadedTransformer]:
        """Load a model and free it at the end. See `Engine.open`."""
        device = pick_device(self.device)
        quantization = self.facts(subject).quantization
        loaded = None
        try:
            network = self._load(subject.spec, subject.arguments, device, quantization)
            loaded = LoadedTransformer(network, subject.label, quantization)
            del network
            yield loaded
        finally:
            if loaded is not None:
                loaded.close()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()

    def close(self) -> None:
        """Do nothing: models are freed when their context ends."""

    def _load(
        self, model: ModelSpec, arguments: Mapping[str, Any], device: torch.device, quantization: str | None
    ) -> PreTrainedModel:
        dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        options = {"dtype": dtype, "trust_remote_code": self.trust_remote_code, **arguments}
        return load_network(model, options, device, quantization)

    def _dtype_name(self, arguments: Mapping[str, Any]) -> str | None:
        """Return the dtype that is requested for the model; None means the config's own."""
        dtype = arguments.get("torch_dtype") or arguments.get("dtype") or self.dtype
        if not isinstance(dtype, str | torch.dtype) or dtype == "auto":
            return None
        return str(dtype).removeprefix("torch.")


@dataclass(slots=True)
class LoadedTransformer:
    """A loaded model with a hook on its head module."""

    network: PreTrainedModel | None
    label: str
    quantization: str | None
    _seen: list[Tensor] = field(default_factory=list)
    _routes: RouteWatch | None = None
    _origin: str = field(default_factory=lambda: f"{os.getpid()}-{uuid.uuid4().hex}")

    def __post_init__(self) -> None:
        """Find the experts, if it has any."""
        experts = self.facts.experts
        self._routes = None if experts is None else RouteWatch(self._loaded, experts, self.label)

    @property
    def facts(self) -> ModelFacts:
        """The facts of the loaded model."""
        network = self._loaded
        facts = facts_of(network.config, str(network.dtype).removeprefix("torch."))
        return replace(facts, quantization=self.quantization)  # dequantized weights have the quantized values

    @property
    def routing(self) -> Routing | None:
        """How it routes tokens to experts. See `LoadedModel.routing`."""
        return None if self._routes is None else self._routes.routing

    @property
    def origin(self) -> str:
        """A name of one load in one process. See `LoadedModel.origin`."""
        return self._origin

    @property
    def runtime(self) -> dict[str, Any]:
        """The implementations that transformers chose. See `LoadedModel.runtime`."""
        config = self._loaded.config
        chosen = {"attention_backend": getattr(config, "_attn_implementation", None)}
        if self._routes is not None:
            chosen["moe_runner_backend"] = getattr(config, "_experts_implementation", None)
        return {name: value for name, value in chosen.items() if isinstance(value, str)}

    @property
    def heads(self) -> list[Head]:
        """Candidates for its head: a plain linear one, with each interpretation of the config's transforms.

        Raises:
            ModelError: the head's weight was offloaded and cannot be read back.

        """
        module, config = self._loaded.get_output_embeddings(), self._loaded.config.get_text_config()
        if not isinstance(module, nn.Module):
            return []
        with _brought_back(module, self.label):
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.dim() != 2:
                return []
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        factors = [float(value) for name in _SCALES if (value := getattr(config, name, None))]
        scales = [*factors, *(1 / factor for factor in factors), 1.0]
        softcap = getattr(config, _SOFTCAP, None)
        return [
            Head(weight=weight, bias=bias, scale=scale, softcap=cap)
            for cap, scale in product([softcap, None] if softcap else [None], scales)
        ]

    @torch.inference_mode()
    def prefill(self, windows: Windows, indices: Sequence[int], rows: Sequence[int] | None) -> Iterator[Prefill]:
        """Run windows one by one. See `LoadedModel.prefill`."""
        network = self._loaded
        head = network.get_output_embeddings()
        selected = None if rows is None else torch.tensor(rows)
        hooks = [_watch(head, self._seen, selected)] if isinstance(head, nn.Module) else []
        hooks += self._routes.attach() if self._routes is not None else []
        start, end = _device_of(network.get_input_embeddings()), _device_of(head)
        try:
            for index in indices:
                self._forget()
                ids = torch.from_numpy(windows.token_ids[index]).long()[None].to(start)
                try:
                    logits = network(input_ids=ids, use_cache=False).logits[0]
                except Exception as error:  # out of memory, missing kernels, remote code
                    more = isinstance(error, torch.OutOfMemoryError)
                    hint = " Give a smaller --kld-window-size or --kld-dtype, or a `device_map`." if more else ""
                    raise CaptureError(
                        f"{self.label}, window {index}: the forward pass failed: {type(error).__name__}: {error}{hint}"
                    ) from error
                # If the head runs more than once (speculative layers) or not at all, its input is ambiguous or unknown.
                hidden = self._seen[0] if len(self._seen) == 1 else None
                if selected is not None and len(logits) == windows.size:
                    logits = logits[selected.to(logits.device)]
                if selected is not None:
                    # With `device_map` the hidden states are on the last layer's device, and the logits are
                    # returned on the first layer's; the check runs on the head's device.
                    hidden, logits = None if hidden is None else hidden.to(end), logits.to(end)
                experts = None if self._routes is None else self._routes.take(windows.size)
                yield Prefill(window=index, hidden=hidden, logits=logits, experts=experts)
        finally:
            self._forget()
            for hook in hooks:
                hook.remove()

    @torch.inference_mode()
    def decode(self, windows: Windows, indices: Sequence[int], rows: Sequence[int] | None) -> Iterator[Prefill]:
        """Decode windows in batches with transformers' own generation loop. See `LoadedModel.decode`.

        The model's `generation_config` says which cache it uses, such as a quantized one.
        """
        from pytest_kld.engines.decoding import ForcedSteps

        network, decoding = self._loaded, windows.decoding
        assert decoding is not None
        if not network.can_generate():
            raise ModelError(f"{self.label} cannot decode: transformers has no generation for it")
        start, end = _device_of(network.get_input_embeddings()), _device_of(network.get_output_embeddings())
        positions = range(windows.first_position, windows.size) if rows is None else rows
        for batch in decoding.batches(indices):
            ids = torch.from_numpy(windows.token_ids[batch]).long().to(start)
            steps = ForcedSteps(ids, decoding.prompt_size, set(positions), self.label, self._routes)
            try:
                steps.run(network)
            except KLDError:
                raise
            except Exception as error:
                more = isinstance(error, torch.OutOfMemoryError)
                hint = " Give a smaller --kld-concurrency or --kld-window-size." if more else ""
                raise CaptureError(
                    f"{self.label}, windows {batch[0]} to {max(batch)}: decoding failed: {type(error).__name__}: "
                    f"{error}{hint}"
                ) from error
            logits = torch.stack(steps.logits, 1)
            hidden = torch.stack(steps.hidden, 1) if len(steps.hidden) == windows.rows else None
            for place, index in enumerate(dict.fromkeys(batch)):
                seen = None if hidden is None else hidden[place].to(end)
                experts = torch.stack([step[place] for step in steps.experts]) if steps.experts else None
                kept = logits[place].to(end) if rows else logits[place]
                yield Prefill(window=index, hidden=seen, logits=kept, experts=experts)

    def close(self) -> None:
        """Release the model."""
        self._forget()
        self.network = self._routes = None

    def _forget(self) -> None:
        """Forget what the last pass showed."""
        self._seen.clear()
        if self._routes is not None:
            self._routes.clear()

    @property
    def _loaded(self) -> PreTrainedModel:
        if self.network is None:
            raise ModelError(f"{self.label} is closed")
        return self.network


def _watch(head: nn.Module, seen: list[Tensor], rows: Tensor | None) -> Any:
    """Record the head's input and pass only the requested rows on, so that the head computes no others."""

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0]
        seen.append(hidden[0])
        if rows is None or int(rows.max()) >= hidden.shape[1]:  # the head is used for something else than the prefill
            return None
        return (hidden[:, rows.to(hidden.device)], *args[1:])

    return head.register_forward_pre_hook(before)


def _device_of(module: Any) -> torch.device:
    """Return a module's device; the CPU if it is offloaded, since its inputs are moved when it runs."""
    weight = getattr(module, "weight", None)
    return weight.device if isinstance(weight, Tensor) and not weight.is_meta else torch.device("cpu")


@contextmanager
def _brought_back(module: nn.Module, label: str) -> Iterator[None]:
    """Load an offloaded module's tensors into the CPU's memory; leave any other module as it is."""
    if not any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        yield
        return
    from accelerate.utils import align_module_device, has_offloaded_params  # installed, since it offloaded the module

    if not has_offloaded_params(module):
        raise ModelError(
            f"{label}: the weight of its head is on the device `meta`, and accelerate does not hold it: put the head "
            "on a real device with `device_map`, or give --kld-store=logits"
        )
    with align_module_device(module, torch.device("cpu")):
        yield


def _quantization(arguments: Mapping[str, Any]) -> Any:
    """Return the quantization that arguments declare."""
    return arguments.get("quantization_config") or ({"quant_method": "gguf"} if arguments.get("gguf_file") else None)
