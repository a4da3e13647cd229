"""The tiny engine from outside: all that a served engine has to say of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_kld.engines.served.kind import Answer, Options, Settings
from pytest_kld.errors import ServerError
from pytest_kld.subjects.model import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiny:
    """See `ServerKind`; a prefill is run in chunks of so many tokens."""

    chunk: int = 1_000_000
    name: str = "tiny"
    title: str = "Tiny"
    package: str = "transformers"
    launch: tuple[str, ...] = ("-m", "tiny_server")
    seams: str = "tiny_server"
    health: str = "/ready"
    auto_dtype: str = "float32"
    command_option: str = "--kld-tiny-command"
    note_on_named_gpus: str = "it uses no GPU"
    hook_advice: str = "TINY_FAULT must not be no-hook"

    def check_arguments(self, arguments: Sequence[str], source: str, _options: Options | None = None) -> None:
        if "--port" in arguments:
            raise ServerError(f"{source}: --port cannot be given: a free port is picked.")

    def complete(self, arguments: Sequence[str], _settings: Settings, _options: Options | None = None) -> list[str]:
        return list(arguments)

    def address(self, model: ModelSpec, port: int) -> list[str]:
        return ["--model", model.source, "--port", str(port)]

    def gpus_needed(self, _arguments: Sequence[str], _options: Options | None = None) -> int:
        return 0

    def numeric_arguments(self, arguments: Sequence[str], _options: Options | None = None) -> list[list[str]]:
        return [list(arguments)]

    def variables(self, _environment: Mapping[str, str]) -> dict[str, str]:
        return {}

    def axis_flags(self, axes: Mapping[str, str]) -> list[str]:
        return [word for name, value in axes.items() for word in (f"--{name}", value)]

    def hint(self, log: str) -> str | None:
        return "the flag is not known" if "unrecognized arguments" in log else None

    def request(self, request_id: str, token_ids: Sequence[int]) -> tuple[str, dict[str, Any]]:
        return "/run", {"id": request_id, "tokens": list(token_ids), "chunk": self.chunk}

    def read_answer(self, told: Any) -> Answer:
        return Answer(
            request_id=told["id"],
            prompt_tokens=len(told["tokens"]),
            log_probs=list(zip(told["said"], told["tokens"], strict=True)),
        )

    def describe(self, url: str, _api_key: str | None) -> dict[str, Any]:
        return {"url": url}
