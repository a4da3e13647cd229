"""The engine of the mission: SGLang servers with the capture hook in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_kld.engines import ModelFacts
from pytest_kld.engines.checkpoint import read_facts
from pytest_kld.engines.served.client import ServedModel
from pytest_kld.engines.sglang.arguments import check_arguments, numeric_arguments
from pytest_kld.engines.sglang.description import server_description
from pytest_kld.subjects.subject import without_secrets

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_kld.engines.served.pool import ServerPool
    from pytest_kld.subjects.subject import Subject


@dataclass(frozen=True, slots=True, kw_only=True)
class SGLangEngine:
    """Boots a server for each model, or uses one that runs already.

    A Subject's arguments are `args` (flags for `launch_server`), or `url` (a running server instead).

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

    def facts(self, subject: Subject) -> ModelFacts:
        """Read a model's facts from its config. See `Engine.facts`."""
        dtype = "bfloat16" if self.dtype == "auto" else self.dtype  # SGLang's choice is of 16 bits too
        facts = read_facts(subject.spec, dtype=dtype, trust_remote_code=self.trust_remote_code)
        check_arguments(subject.arguments.get("args", ()), "SGLang's arguments")
        return facts

    def fingerprint(self, subject: Subject) -> dict[str, Any]:
        """Return versions, GPUs, and every argument that may change logits. See `Engine.fingerprint`."""
        if url := subject.arguments.get("url"):
            return {"engine": "sglang", **server_description(url, self.api_key)}
        environment = subject.environment
        installed = self.servers.installed(environment)
        return {
            "engine": "sglang",
            "versions": installed.versions,
            "devices": list(installed.devices),
            "arguments": numeric_arguments(self.servers.complete(subject.arguments.get("args", ()))),
            "environment": without_secrets(environment),
        }

    @contextmanager
    def open(self, subject: Subject) -> Iterator[ServedModel]:
        """Use a server for the model; it stays until another needs its GPUs. See `Engine.open`."""
        if url := subject.arguments.get("url"):
            server, base = None, url.rstrip("/")
        else:
            server = self.servers.get(subject.spec, subject.arguments.get("args", ()), subject.environment)
            base = server.url
        yield ServedModel.connect(
            base,
            model=subject.spec,
            pool=None if url else self.servers,
            server=server,
            capture_dir=self.capture_dir,
            api_key=self.api_key if url else None,
        )

    def close(self) -> None:
        """Shut every server down."""
        self.servers.close()
