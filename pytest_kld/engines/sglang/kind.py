"""SGLang as a served engine: what is specific to it. The rest is in `engines/served`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_kld.engines.served.kind import Answer, Settings
from pytest_kld.engines.sglang import arguments as flags
from pytest_kld.engines.sglang.hints import hint

if TYPE_CHECKING:
    from pytest_kld.engines.served.kind import Options, ServerKind
    from pytest_kld.subjects.model import ModelSpec

_CHUNKS = {
    "SGLANG_ENABLE_LOGITS_PROCESSER_CHUNK": "1",
    "SGLANG_LOGITS_PROCESSER_CHUNK_SIZE": "256",
    "SGLANG_LOGPROB_CHUNK_SIZE": "256",
}
"""SGLang computes its own log-probs for this many rows at a time; older and newer releases use different names.

By default it computes a whole window at once: 3 to 4.4 GB for 2,048 tokens and a vocabulary of 152,064.
"""
_CHUNK_SWITCH = "SGLANG_ENABLE_LOGPROB_CHUNK"


@dataclass(frozen=True, slots=True, kw_only=True)
class SGLang:
    """See `ServerKind`."""

    name: str = "sglang"
    title: str = "SGLang"
    package: str = "sglang"
    launch: tuple[str, ...] = flags.LAUNCH
    seams: str = "pytest_kld.hook.sglang"
    health: str = "/health"
    auto_dtype: str = "bfloat16"
    command_option: str = "--kld-sglang-command"
    note_on_named_gpus: str = (
        "the GPUs are visible by UUID only (MIG, or a container that hides their numbers), so SGLang's custom "
        "all-reduce is off and other kernels are measured than on whole GPUs"
    )
    hook_advice: str = (
        "SGLANG_PLUGINS, if set, must name pytest_kld. SGLang before 0.5.11 needs `pytest-kld patch --apply`"
    )

    def check_arguments(self, arguments: Sequence[str], source: str, options: Options | None = None) -> None:
        """Refuse flags. See `ServerKind.check_arguments`."""
        flags.check_arguments(arguments, source, options)

    def complete(self, arguments: Sequence[str], settings: Settings, options: Options | None = None) -> list[str]:
        """Add flags that are not given. See `ServerKind.complete`."""
        added = []
        if not flags.has_flag(arguments, flags.ONE_WINDOW_A_BATCH, options):
            added += [flags.ONE_WINDOW_A_BATCH, "1"]
        if settings.dtype != "auto" and not flags.has_flag(arguments, "--dtype", options):
            added += ["--dtype", settings.dtype]
        if settings.device == "cpu" and not flags.has_flag(arguments, "--device", options):
            added += ["--device", "cpu"]
        if settings.trust_remote_code and not flags.has_flag(arguments, "--trust-remote-code", options):
            added += ["--trust-remote-code"]
        return [*arguments, *added]

    def address(self, model: ModelSpec, port: int) -> list[str]:
        """Name model and address. See `ServerKind.address`."""
        address = ["--model-path", model.source, "--host", "127.0.0.1", "--port", str(port)]
        return [*address, "--revision", model.revision] if model.revision else address

    def gpus_needed(self, arguments: Sequence[str], options: Options | None = None) -> int:
        """Multiply the parallel sizes. See `ServerKind.gpus_needed`."""
        return flags.gpus_needed(arguments, options)

    def numeric_arguments(self, arguments: Sequence[str], options: Options | None = None) -> list[list[str]]:
        """Leave out what moves no logit. See `ServerKind.numeric_arguments`."""
        return flags.numeric_arguments(arguments, options)

    def variables(self, environment: Mapping[str, str]) -> dict[str, str]:
        """Bound the memory of SGLang's own log-probs. See `ServerKind.variables`."""
        return {} if any(name in environment for name in (*_CHUNKS, _CHUNK_SWITCH)) else dict(_CHUNKS)

    def axis_flags(self, axes: Mapping[str, str]) -> list[str]:
        """Return the axes' flags. See `ServerKind.axis_flags`."""
        return flags.axis_flags(axes)

    def hint(self, log: str) -> str | None:
        """Return advice for a log. See `ServerKind.hint`."""
        return hint(log)

    def request(self, request_id: str, token_ids: Sequence[int]) -> tuple[str, dict[str, Any]]:
        """Write a request. See `ServerKind.request`."""
        body = {
            "input_ids": list(token_ids),
            "rid": request_id,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        return "/generate", body

    def read_answer(self, told: Any) -> Answer:
        """Read an answer. See `ServerKind.read_answer`."""
        meta = told["meta_info"]
        return Answer(
            request_id=meta["id"],
            prompt_tokens=meta["prompt_tokens"],
            log_probs=[(value, token) for value, token, *_ in meta["input_token_logprobs"]],
        )

    def describe(self, url: str, api_key: str | None) -> dict[str, Any]:
        """Ask a running server. See `ServerKind.describe`."""
        from pytest_kld.engines.sglang.description import server_description

        return server_description(url, api_key)


KIND: ServerKind = SGLang()
