"""The tiny engine from outside: all that a served engine has to say of itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from pytest_kld.engines.served.kind import Answer, Decoded, Options, Settings
from pytest_kld.engines.served.load import Load, LoadResult
from pytest_kld.errors import ServerError
from pytest_kld.subjects.model import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyLoad:
    """See `LoadTool`; a server that runs at most so many requests at a time."""

    most: int | None = None
    name: str = "tiny_load"
    gauges: tuple[str, ...] = ()
    wants_own_server: bool = False

    def most_concurrent(self, _arguments: Sequence[str]) -> int | None:
        return self.most

    def command(self, load: Load, url: str, _model: str, _tokenizer: str, output: Path) -> list[str]:
        asked = {"concurrency": load.concurrency, "requests": load.requests, "seed": load.seed}
        asked |= {"input": load.input_tokens, "output": load.output_tokens}
        words = [word for name, value in asked.items() for word in (f"--{name}", str(value))]
        return ["-m", "tiny_load", "--url", url, "--report", str(output), *words]

    def read(self, text: str) -> LoadResult:
        told = json.loads(text)
        each = (told["e2e"][0] - told["ttft"][0]) / max(1, told["tokens"] / told["completed"] - 1)
        return LoadResult(
            completed=told["completed"],
            output_tokens=told["tokens"],
            seconds=told["seconds"],
            figures={
                "output_tps": told["tokens"] / told["seconds"],
                "total_tps": (told["tokens"] + sum(map(len, told["prompts"]))) / told["seconds"],
                "request_rate": told["completed"] / told["seconds"],
                **{"ttft": median(told["ttft"]), "ttft_p99": max(told["ttft"])},
                **{"tpot": each, "tpot_p99": each, "itl": each, "itl_p99": each},
                **{"e2e": told["median_e2e"], "e2e_p99": max(told["e2e"])},
            },
            mean_e2e=told["mean_e2e"],
            errors=told["errors"],
            most_concurrent=None,
            raw=told,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiny:
    """See `ServerKind`; a prefill is run in chunks of so many tokens."""

    chunk: int = 1_000_000
    name: str = "tiny"
    title: str = "Tiny"
    packages: tuple[str, ...] = ("transformers",)
    launch: tuple[str, ...] = ("-m", "tiny_server")
    seams: str = "tiny_server"
    health: str = "/ready"
    auto_dtype: str = "float32"
    command_option: str = "--kld-tiny-command"
    note_on_named_gpus: str = "it uses no GPU"
    not_finite: str = ""
    hook_advice: str = "TINY_FAULT must not be no-hook"
    load_tool: TinyLoad | None = field(default_factory=TinyLoad)

    def check_arguments(
        self,
        arguments: Sequence[str],
        source: str,
        _options: Options | None = None,
        *,
        capturing: bool = True,  # noqa: ARG002
    ) -> None:
        if "--port" in arguments:
            raise ServerError(f"{source}: --port cannot be given: a free port is picked.")

    def check_device(self, _settings: Settings, versions: Mapping[str, str], gpus: Sequence[str]) -> None:
        pass

    def complete(
        self,
        arguments: Sequence[str],
        _settings: Settings,
        _options: Options | None = None,
        *,
        capturing: bool = True,  # noqa: ARG002
    ) -> list[str]:
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

    def runs_one_at_a_time(self, _told: Mapping[str, Any]) -> bool:
        return True

    def why_not_decoding(self, _told: Mapping[str, Any], _together: int) -> str | None:
        return None

    def check_decoding(self, arguments: Sequence[str], source: str, _options: Options | None = None) -> None:
        if "--draft" in arguments:
            raise ServerError(f"{source}: --draft cannot be given when decoding is measured.")

    def decode_request(
        self, request_ids: Sequence[str], prompts: Sequence[Sequence[int]], count: int
    ) -> tuple[str, dict[str, Any]]:
        return "/decode", {"ids": list(request_ids), "prompts": [list(prompt) for prompt in prompts], "count": count}

    def read_decoded(self, told: Any) -> list[Decoded]:
        return [Decoded(request_id=name, token_ids=tokens) for name, tokens in told["decoded"]]

    def describe(self, url: str, _api_key: str | None) -> dict[str, Any]:
        return {"url": url}
