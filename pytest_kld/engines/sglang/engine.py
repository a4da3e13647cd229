"""The engine of the mission: SGLang servers with the capture hook in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_kld.engines import ModelFacts
from pytest_kld.engines.checkpoint import read_facts
from pytest_kld.engines.sglang.arguments import check_arguments, numeric_arguments
from pytest_kld.engines.sglang.client import ServedModel
from pytest_kld.engines.sglang.description import server_description

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_kld.engines.sglang.pool import ServerPool
    from pytest_kld.subjects.model import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class SGLangEngine:
    """Boots a server for each model, or uses one that runs already.

    The engine's arguments for a model are `args` (flags for `launch_server`), `env` (environment variables), and
    `url` (a running server instead).

    Attributes:
        servers: boots them and shuts them down.
        capture_dir: the directory that servers and this process see.
        api_key: for servers named by URL.
        dtype: `auto` (SGLang's choice) or a torch dtype's name.
        trust_remote_code: whether a repository's own code may run.

    """

    servers: ServerPool
    capture_dir: Path
    api_key: str | None
    dtype: str
    trust_remote_code: bool

    def facts(self, model: ModelSpec, arguments: Mapping[str, Any]) -> ModelFacts:
        """Read a model's facts from its config. See `Engine.facts`."""
        dtype = "bfloat16" if self.dtype == "auto" else self.dtype  # SGLang's choice is of 16 bits too
        facts = read_facts(model, dtype=dtype, trust_remote_code=self.trust_remote_code, arguments={})
        check_arguments(arguments.get("args", ()), "SGLang's arguments")
        return facts

    def fingerprint(self, model: ModelSpec, arguments: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Return versions, GPUs, and every argument that may change logits. See `Engine.fingerprint`."""
        if url := arguments.get("url"):
            return {"engine": "sglang", **server_description(url, self.api_key)}
        environment = arguments.get("env", {})
        installed = self.servers.installed(environment)
        return {
            "engine": "sglang",
            "versions": installed.versions,
            "devices": list(installed.devices),
            "arguments": numeric_arguments(self.servers.complete(arguments.get("args", ()))),
            "environment": dict(sorted(environment.items())),
        }

    @contextmanager
    def open(self, model: ModelSpec, arguments: Mapping[str, Any]) -> Iterator[ServedModel]:
        """Use a server for the model; it stays until another needs its GPUs. See `Engine.open`."""
        if url := arguments.get("url"):
            server, base = None, url.rstrip("/")
        else:
            server = self.servers.get(model, arguments.get("args", ()), arguments.get("env", {}))
            base = server.url
        yield ServedModel.connect(
            base,
            model=model,
            pool=None if url else self.servers,
            server=server,
            capture_dir=self.capture_dir,
            api_key=self.api_key if url else None,
        )

    def close(self) -> None:
        """Shut every server down."""
        self.servers.close()
