"""A server as a child process: boot, watch, stop. Knows nothing about language models or KLD."""

from __future__ import annotations

import json
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import requests

from pytest_kld.errors import ServerError
from pytest_kld.servers import supervisor
from pytest_kld.servers.deadline import within

_PORTS = range(20_000, 50_000)
_SECONDS_BETWEEN_LOOKS = 0.5
_HEALTH_TIMEOUT_SECONDS = 30
_SECONDS_TO_NOTICE = 1.0
_SECONDS_TO_KILL = 30
"""How long killing may take, after the time that a server has to end by itself."""
_TAIL_LINES = 40
_TAIL_BYTES = 256 << 10
_LINE_CHARACTERS = 300


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on now.

    The range leaves room above it, because some releases of SGLang also use the port 10,000 higher.

    Raises:
        ServerError: none of a hundred random ports is free.

    """
    for port in random.sample(_PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ServerError(f"no port of 127.0.0.1 between {_PORTS.start:,} and {_PORTS.stop:,} is free")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerCommand:
    """How to start a server.

    Attributes:
        argv: the command.
        environment: its complete environment.
        url: where it will answer.
        health: the path that answers 200 when it is ready.
        log: the file for what it prints.
        startup_timeout: seconds it may take to become ready.
        grace: seconds it may take to end after it is asked to; then it is killed.
        hint: turns the end of the log into advice, or None.
        container: for a command that starts a container, the file with its id and the command that ends it.

    """

    argv: Sequence[str]
    environment: Mapping[str, str]
    url: str
    health: str
    log: Path
    startup_timeout: float
    grace: float = 20.0
    hint: Callable[[str], str | None] = lambda _: None
    container: tuple[Path, Sequence[str]] | None = None


class Server:
    """A running server and every process that it started. `stop` ends them all; so does the death of this process."""

    def __init__(self, command: ServerCommand, on_wait: Callable[[float], None] = lambda _: None) -> None:
        """Start it and wait until it is ready.

        Args:
            command: how.
            on_wait: called now and then with the seconds waited so far.

        Raises:
            ServerError: it ended or was not ready in time. The message has its exit code or the time waited, the
                command, the end of the log and a hint.

        """
        self.command = command
        command.log.parent.mkdir(parents=True, exist_ok=True)
        container = None if command.container is None else [str(command.container[0]), list(command.container[1])]
        with command.log.open("wb") as log:
            # Standard input is the supervisor's lifeline: when this process dies, the pipe closes, and the supervisor
            # ends the server.
            self._supervisor = subprocess.Popen(  # noqa: S603
                [
                    *(sys.executable, "-I", supervisor.__file__),  # -I: ignore the server's PYTHONPATH
                    *(str(command.grace), json.dumps(container), *command.argv),
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(command.environment),
                start_new_session=True,
            )
        try:
            self._wait_until_ready(on_wait)
        except BaseException:
            self.stop()
            raise

    @property
    def url(self) -> str:
        """Where it answers."""
        return self.command.url

    @property
    def log(self) -> Path:
        """The file with what it printed."""
        return self.command.log

    @property
    def pid(self) -> int:
        """The process id of its supervisor."""
        return self._supervisor.pid

    @property
    def exit_code(self) -> int | None:
        """Return the exit code, or None while it runs."""
        return self._supervisor.poll()

    @property
    def ending(self) -> str | None:
        """How it ended, if it has or does in the next second: its connections close before its supervisor ends."""
        with suppress(subprocess.TimeoutExpired):
            self._supervisor.wait(timeout=_SECONDS_TO_NOTICE)
        code = self.exit_code
        if code is None:
            return None
        killed = ": it was killed, as the system does when memory runs out" if code == 128 + signal.SIGKILL else ""
        return f"ended with exit code {code}{killed}"

    def require_alive(self) -> None:
        """Raise `ServerError` if it has ended."""
        if self.exit_code is not None:
            raise self.failure(f"the server {self.ending}")

    def failure(self, what: str) -> ServerError:
        """Return an error that says what happened, with the command, the end of the log and a hint."""
        tail = self.log_tail()
        advice = self.command.hint(tail)
        lines = [
            f"{what}.",
            f"command: {shlex.join(self.command.argv)}",
            f"log: {self.log}, its last lines:",
            *(f"  | {line}" for line in tail.splitlines()),
        ]
        if advice:
            lines.append(f"hint: {advice}")
        return ServerError("\n".join(lines))

    def log_tail(self) -> str:
        """Return the last lines of the log, with long ones truncated."""
        return log_tail(self.log)

    def stop(self) -> None:
        """End the server and every process that it started, and check that all of them are gone.

        Raises:
            ServerError: they did not end in time.

        """
        if self._supervisor.poll() is None:
            self._supervisor.send_signal(signal.SIGTERM)
        try:
            self._supervisor.wait(timeout=self.command.grace + _SECONDS_TO_KILL)
        except subprocess.TimeoutExpired:
            raise self.failure(f"the server did not end; its supervisor is process {self.pid}") from None
        finally:
            if self._supervisor.stdin is not None:
                self._supervisor.stdin.close()

    def _wait_until_ready(self, on_wait: Callable[[float], None]) -> None:
        started = time.monotonic()
        while not self._is_ready():
            waited = time.monotonic() - started
            if self.exit_code is not None:
                raise self.failure(f"the server {self.ending} before it was ready")
            if waited > self.command.startup_timeout:
                raise self.failure(f"the server was not ready after {self.command.startup_timeout:g} s")
            on_wait(waited)
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        self.require_alive()  # another process may be answering on that port

    def _is_ready(self) -> bool:
        try:
            url = f"{self.url}{self.command.health}"
            timeout = min(_HEALTH_TIMEOUT_SECONDS, self.command.startup_timeout)
            return within(timeout, lambda: requests.get(url, timeout=timeout).ok)
        except (requests.RequestException, TimeoutError):
            return False


def log_tail(log: Path) -> str:
    """Return the last 40 lines of a log of any size, each truncated to 300 characters."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError as error:
        return f"(the log cannot be read: {error})"
    return "\n".join(
        line if len(line) <= _LINE_CHARACTERS else f"{line[:_LINE_CHARACTERS]} …" for line in lines[-_TAIL_LINES:]
    )
