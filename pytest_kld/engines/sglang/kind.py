"""SGLang as a served engine: what is specific to it. The rest is in `engines/served`."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_kld.engines.served.kind import Answer, Decoded, Settings
from pytest_kld.engines.sglang.arguments import LAUNCH, ONE_WINDOW_A_BATCH, RULES, SPECULATION
from pytest_kld.engines.sglang.hints import hint
from pytest_kld.engines.sglang.load import LOAD_TOOL
from pytest_kld.errors import ServerError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pytest_kld.engines.served.kind import Options, ServerKind
    from pytest_kld.engines.served.load import LoadTool
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
    packages: tuple[str, ...] = ("sglang",)
    launch: tuple[str, ...] = LAUNCH
    seams: str = "pytest_kld.hook.sglang"
    health: str = "/health"
    auto_dtype: str = "bfloat16"
    command_option: str = "--kld-sglang-command"
    note_on_named_gpus: str = (
        "the GPUs are visible by UUID only (MIG, or a container that hides their numbers), so SGLang's custom "
        "all-reduce is off and other kernels are measured than on whole GPUs"
    )
    not_finite: str = ""
    load_tool: LoadTool = LOAD_TOOL
    hook_advice: str = (
        "SGLANG_PLUGINS, if set, must name pytest_kld. SGLang before 0.5.11 needs `pytest-kld patch --apply`"
    )

    def check_arguments(
        self, arguments: Sequence[str], source: str, options: Options | None = None, *, capturing: bool = True
    ) -> None:
        """Refuse flags. See `ServerKind.check_arguments`."""
        RULES.check(arguments, source, options, capturing=capturing)

    def check_device(self, settings: Settings, versions: Mapping[str, str], gpus: Sequence[str]) -> None:
        """Refuse none: `--device` gives it. See `ServerKind.check_device`."""

    def complete(
        self,
        arguments: Sequence[str],
        settings: Settings,
        options: Options | None = None,
        *,
        capturing: bool = True,
    ) -> list[str]:
        """Add flags that are not given. See `ServerKind.complete`."""
        added = []
        if capturing and not RULES.has(arguments, ONE_WINDOW_A_BATCH, options):
            added += [ONE_WINDOW_A_BATCH, "1"]
        if settings.dtype != "auto" and not RULES.has(arguments, "--dtype", options):
            added += ["--dtype", settings.dtype]
        if settings.device == "cpu" and not RULES.has(arguments, "--device", options):
            added += ["--device", "cpu"]
        if settings.trust_remote_code and not RULES.has(arguments, "--trust-remote-code", options):
            added += ["--trust-remote-code"]
        return [*arguments, *added]

    def address(self, model: ModelSpec, port: int) -> list[str]:
        """Name model and address. See `ServerKind.address`."""
        address = ["--model-path", model.source, "--host", "127.0.0.1", "--port", str(port)]
        return [*address, "--revision", model.revision] if model.revision else address

    def gpus_needed(self, arguments: Sequence[str], options: Options | None = None) -> int:
        """Multiply the parallel sizes. See `ServerKind.gpus_needed`."""
        on_cpu = dict(RULES.in_full(arguments, options)).get("--device") == ("cpu",)
        return 0 if on_cpu else RULES.product_of_sizes(arguments, options)

    def numeric_arguments(self, arguments: Sequence[str], options: Options | None = None) -> list[list[str]]:
        """Leave out what moves no logit. See `ServerKind.numeric_arguments`."""
        return RULES.numeric(arguments, options)

    def variables(self, environment: Mapping[str, str]) -> dict[str, str]:
        """Bound the memory of SGLang's own log-probs. See `ServerKind.variables`."""
        return {} if any(name in environment for name in (*_CHUNKS, _CHUNK_SWITCH)) else dict(_CHUNKS)

    def axis_flags(self, axes: Mapping[str, str]) -> list[str]:
        """Return the axes' flags. See `ServerKind.axis_flags`."""
        return RULES.axis_flags(axes)

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
            "return_routed_experts": True,  # of no effect without --enable-return-routed-experts
        }
        return "/generate", body

    def read_answer(self, told: Any) -> Answer:
        """Read an answer. See `ServerKind.read_answer`."""
        meta = told["meta_info"]
        return Answer(
            request_id=meta["id"],
            prompt_tokens=meta["prompt_tokens"],
            log_probs=[(value, token) for value, token, *_ in meta["input_token_logprobs"]],
            experts=_experts(meta),
        )

    def runs_one_at_a_time(self, told: Mapping[str, Any]) -> bool:  # noqa: ARG002
        """Say yes: it is booted so. See `ServerKind.runs_one_at_a_time`."""
        return True

    def why_not_decoding(self, told: Mapping[str, Any], together: int) -> str | None:  # noqa: ARG002
        """Refuse speculation. See `ServerKind.why_not_decoding`."""
        if told.get("speculative_algorithm") is not None:
            return f"it runs with --speculative-algorithm {told['speculative_algorithm']}, and {SPECULATION}"
        return None

    def check_decoding(self, arguments: Sequence[str], source: str, options: Options | None = None) -> None:
        """Refuse speculation. See `ServerKind.check_decoding`."""
        for name, _ in RULES.in_full(arguments, options):
            if name.startswith("--speculative-"):
                raise ServerError(f"{source}: {name} cannot be given when decoding is measured: {SPECULATION}.")

    def decode_request(
        self, request_ids: Sequence[str], prompts: Sequence[Sequence[int]], count: int
    ) -> tuple[str, dict[str, Any]]:
        """Write a request. See `ServerKind.decode_request`."""
        body = {
            "input_ids": [list(prompt) for prompt in prompts],
            "rid": list(request_ids),
            "extra_key": list(request_ids),  # what is cached of a prompt is not shared
            "sampling_params": {"max_new_tokens": count, "temperature": 0, "ignore_eos": True},
        }
        return "/generate", body

    def read_decoded(self, told: Any) -> list[Decoded]:
        """Read an answer. See `ServerKind.read_decoded`."""
        return [Decoded(request_id=one["meta_info"]["id"], token_ids=one["output_ids"]) for one in told]

    def describe(self, url: str, api_key: str | None) -> dict[str, Any]:
        """Ask a running server. See `ServerKind.describe`."""
        from pytest_kld.engines.sglang.description import server_description

        return server_description(url, api_key)


def _experts(meta: Mapping[str, Any]) -> NDArray[np.int32] | None:
    """Return the experts [tokens, layers · K] in an answer; None if the server runs without the flag.

    They are int32 in base64, of every token that was run: those of the prompt if one token is sampled.
    """
    import numpy as np  # not needed to check options

    if (told := meta.get("routed_experts")) is None:
        return None
    return np.frombuffer(b64decode(told, validate=True), dtype="<i4").reshape(meta["prompt_tokens"], -1)


KIND: ServerKind = SGLang()
