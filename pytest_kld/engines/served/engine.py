"""Engines that run as servers with the capture hook inside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_kld.engines import ModelFacts
from pytest_kld.engines.checkpoint import read_facts
from pytest_kld.engines.served.client import ServedModel
from pytest_kld.engines.served.pool import default_command
from pytest_kld.servers.launchers import command_in_key

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_kld.engines.served.kind import ServerKind
    from pytest_kld.engines.served.pool import ServerHandle, ServerPool
    from pytest_kld.subjects.subject import Subject


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedEngine:
    """Boots a server for each model, or uses one that is already running.

    A Subject's arguments are `args` (flags of the server's command), or `url` (a running server instead).

    Attributes:
        servers: boots servers and shuts them down.
        capture_dir: the directory that servers and this process see.
        api_key: for servers named by URL.

    """

    servers: ServerPool
    capture_dir: Path
    api_key: str | None

    @property
    def kind(self) -> ServerKind:
        """The kind of server."""
        return self.servers.kind

    def facts(self, subject: Subject) -> ModelFacts:
        """Read a model's facts from its config. See `Engine.facts`."""
        settings = self.servers.settings
        dtype = self.kind.auto_dtype if settings.dtype == "auto" else settings.dtype
        facts = read_facts(subject.spec, dtype=dtype, trust_remote_code=settings.trust_remote_code)
        arguments, source = subject.arguments.get("args", ()), f"{self.kind.title}'s arguments"
        self.kind.check_arguments(arguments, source)
        if subject.path == "decode":
            self.kind.check_decoding(arguments, source)
        return facts

    def fingerprint(self, subject: Subject) -> dict[str, Any]:
        """Return versions, GPUs, and every argument and variable that may change logits. See `Engine.fingerprint`."""
        if url := subject.arguments.get("url"):
            return {"engine": self.kind.name, **self._running(url, subject)}
        environment = subject.environment
        installed = self.servers.installed(environment)
        command = tuple(self.servers.command)
        completed = self.servers.complete(subject.arguments.get("args", ()), environment)
        return {
            "engine": self.kind.name,
            "versions": installed.versions,
            "devices": list(installed.devices),
            "command": None if command == default_command(self.kind) else command_in_key(command),
            "arguments": self.kind.numeric_arguments(completed, installed.options),
            "environment": self.servers.environment(environment),
            "notes": self.servers.notes(completed, environment),
        }

    def _running(self, url: str, subject: Subject) -> dict[str, Any]:
        """Return what a running server and its hook report: versions, arguments, GPU and environment."""
        described = self.kind.describe(url, self.api_key)
        with self.open(subject) as served:
            told = served.handshake
        arguments = {"arguments": told["arguments"], **described}
        return {**arguments, "devices": [told["device"]], "environment": told["environment"], "torch": told["torch"]}

    @contextmanager
    def open(self, subject: Subject) -> Iterator[ServedModel]:
        """Use a server for the model; it keeps running until another needs its GPUs. See `Engine.open`."""
        if url := subject.arguments.get("url"):
            yield self._connect(subject, url.rstrip("/"), None)
            return
        arguments = subject.arguments.get("args", ())
        with self.servers.using(subject.spec, arguments, subject.environment, run=subject.run) as server:
            yield self._connect(subject, server.url, server)

    def _connect(self, subject: Subject, url: str, server: ServerHandle | None) -> ServedModel:
        return ServedModel.connect(
            self.kind,
            url,
            model=subject.spec,
            pool=None if server is None else self.servers,
            server=server,
            capture_dir=self.capture_dir,
            api_key=self.api_key if server is None else None,
        )

    def close(self) -> None:
        """Shut down every server that is not in use."""
        self.servers.close()
