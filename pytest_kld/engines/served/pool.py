"""A session's servers: booted on first use, and shut down when another needs their GPUs or at the end."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_kld import __version__
from pytest_kld.errors import ServerError
from pytest_kld.hook.protocol import CAPTURE_DIR_VARIABLE, PROTOCOL
from pytest_kld.servers.environment import numeric_environment
from pytest_kld.servers.launchers import inherited, kill_command, with_environment
from pytest_kld.servers.leases import lease, lease_directory, only_by_name, visibility, visible_gpus
from pytest_kld.servers.quiet import at_work
from pytest_kld.servers.server import Server, ServerCommand, free_port

if TYPE_CHECKING:
    from pytest_kld.engines.served.kind import Options, ServerKind, Settings
    from pytest_kld.progress import Progress
    from pytest_kld.subjects.model import ModelSpec

_QUESTION_TIMEOUT_SECONDS = 300
_KEPT_LOGS = 50
_SECONDS_BETWEEN_NOTES = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """What is installed where an engine runs.

    Attributes:
        versions: versions of the packages that determine a capture's bits.
        devices: the names of the GPUs.
        options: the release's flags; None if its source cannot be read.

    """

    versions: dict[str, str]
    devices: tuple[str, ...]
    options: Options | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerHandle:
    """A running server, for the user's own tests.

    Attributes:
        url: its address.
        model: the user's name for its model.
        log: the file with its output.
        pid: the process that supervises it and everything that it started.
        gpus: the GPUs that it leased.

    """

    url: str
    model: str
    log: Path
    pid: int
    gpus: tuple[str, ...]


@dataclass(slots=True)
class _Running:
    key: tuple[object, ...]
    server: Server
    handle: ServerHandle
    leases: ExitStack
    users: int = 0


@dataclass(slots=True, kw_only=True)
class ServerPool:
    """Boots servers of one kind.

    Attributes:
        kind: the engine.
        command: the command that starts a server; it ends with the kind's `launch`.
        capture_dir: the directory for captures; it has the same path where the servers run.
        log_dir: the directory for the servers' logs.
        startup_timeout: seconds a server may take to become ready.
        settings: the user's choices for all engines, passed on as flags.
        progress: receives notes about boots and waits.
        cpu_servers: how many servers without GPUs may run at once.

    Threads may use a pool together. A server that is in use is not shut down to make room.

    """

    kind: ServerKind
    command: Sequence[str]
    capture_dir: Path
    log_dir: Path
    startup_timeout: float
    settings: Settings
    progress: Progress
    cpu_servers: int = 1
    _ended: bool = False
    _booting: list[int] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _running: list[_Running] = field(default_factory=list)
    _installed: dict[tuple[tuple[str, str], ...], Installed] = field(default_factory=dict)

    @property
    def handles(self) -> list[ServerHandle]:
        """The running servers, the oldest first."""
        return [running.handle for running in self._running]

    def installed(self, environment: Mapping[str, str]) -> Installed:
        """Return what is installed where the engine runs with these variables; ask only once.

        Raises:
            ServerError: the engine or the hook is not installed, or the hook has another version.

        """
        key = tuple(sorted(environment.items()))
        if key not in self._installed:
            variables = {**os.environ, **environment}
            command = with_environment(self.command, environment, variables)
            self._installed[key] = _ask(self.kind, command, variables)
        return self._installed[key]

    def complete(
        self, arguments: Sequence[str], environment: Mapping[str, str], *, capturing: bool = True
    ) -> list[str]:
        """Return all flags of a server except those for its address and model.

        Args:
            arguments: the user's flags.
            environment: variables on top of this process's; they may decide which release runs.
            capturing: whether the server is to capture; one that is only put under load has no flags of ours.

        Raises:
            ServerError: a flag or the device is refused, or the engine or the hook is not installed.

        """
        installed = self.installed(environment)
        self.kind.check_arguments(arguments, f"{self.kind.title}'s arguments", installed.options, capturing=capturing)
        self.kind.check_device(self.settings, installed.versions, installed.devices)
        return self.kind.complete(arguments, self.settings, installed.options, capturing=capturing)

    def get(
        self,
        model: ModelSpec,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        *,
        capturing: bool = True,
        run: int = 1,
    ) -> ServerHandle:
        """Return a server for a model: one that is already running, or a new one. See `using`."""
        with self.using(model, arguments, environment, capturing=capturing, run=run) as handle:
            return handle

    @contextmanager
    def using(
        self,
        model: ModelSpec,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        *,
        capturing: bool = True,
        run: int = 1,
    ) -> Iterator[ServerHandle]:
        """Use a server for a model: one that is already running, or a new one. It stays while the context lasts.

        Args:
            model: the pinned model.
            arguments: the engine's flags, apart from those that are set here.
            environment: variables on top of this process's.
            capturing: whether the server is to capture; in one that is only put under load the hook stays idle.
            run: which of the Subject's runs it is for; no server serves two.

        Yields:
            The server. Afterwards it keeps running until its place is needed.

        Raises:
            ServerError: the server does not boot.

        """
        completed = self.complete(arguments, environment, capturing=capturing)
        key = self._key(model, completed, environment, capturing, run)
        with self._changed:
            known = [one for one in self._running if one.key == key and one.server.exit_code is None]
            if known:
                known[0].users += 1
        running = known[0] if known else self._boot(key, model, completed, environment, capturing)
        try:
            yield running.handle
        finally:
            with self._changed:
                running.users -= 1
                self._changed.notify_all()

    def release(
        self, model: ModelSpec, arguments: Sequence[str], environment: Mapping[str, str], *, run: int = 1
    ) -> None:
        """Shut down a model's capturing server if nobody uses it. See `using`."""
        key = self._key(model, self.complete(arguments, environment), environment, True, run)
        with self._changed:
            for running in [one for one in self._running if one.key == key and not one.users]:
                self._stop(running)

    def _key(
        self, model: ModelSpec, completed: Sequence[str], environment: Mapping[str, str], capturing: bool, run: int
    ) -> tuple[object, ...]:
        return (model.source, model.revision, tuple(completed), tuple(sorted(environment.items())), capturing, run)

    def variables(self, environment: Mapping[str, str]) -> dict[str, str]:
        """Return a server's variables on top of this process's: the user's, and ours if the user set none of them.

        Args:
            environment: the user's variables.

        """
        return {**environment, **self.kind.variables({**os.environ, **environment})}

    def environment(self, given: Mapping[str, str]) -> dict[str, str]:
        """Return all variables that reach a server and may change its numbers, for the cache key."""
        return numeric_environment(inherited(self.command, os.environ), self.variables(given))

    def notes(self, arguments: Sequence[str], environment: Mapping[str, str]) -> list[str]:
        """Return notes for the reader of the figures on how a server with these flags runs here."""
        gpus, options = visible_gpus({**os.environ, **environment}), self.installed(environment).options
        if self.kind.gpus_needed(arguments, options) > 1 and only_by_name(gpus):
            return [self.kind.note_on_named_gpus]
        return []

    def failure(self, handle: ServerHandle, what: str) -> ServerError:
        """Return an error about a server, with the end of its log."""
        for running in self._running:
            if running.handle == handle:
                ending = running.server.ending
                return running.server.failure(what if ending is None else f"{what}; it {ending}")
        return ServerError(f"{what}; the server {handle.url} was shut down")

    def tool(self, words: Sequence[str], environment: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
        """Return the command and the complete environment of a program that runs where the engine runs.

        Args:
            words: what follows the interpreter.
            environment: variables on top of this process's.

        """
        variables = {**os.environ, **self.variables(environment)}
        command = with_environment(self.command, self.variables(environment), variables)
        return [*command[: -len(self.kind.launch)], *words], variables

    def others(self, handle: ServerHandle) -> list[str]:
        """Return the models of our other running servers."""
        return [running.handle.model for running in self._running if running.handle != handle]

    def ended(self, handle: ServerHandle) -> bool:
        """Tell whether a server of ours has ended."""
        return any(running.handle == handle and running.server.exit_code is not None for running in self._running)

    def close(self, *, in_use: bool = False) -> None:
        """Shut down servers and release their GPUs.

        Args:
            in_use: whether to end also those that are in use or being booted, at the end of the session. What uses them
                fails, and the pool boots no more.

        """
        self._ended = self._ended or in_use
        with self._changed:
            for running in list(self._running):
                if in_use or not running.users:
                    self._stop(running)

    def _boot(
        self,
        key: tuple[object, ...],
        model: ModelSpec,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        capturing: bool,
    ) -> _Running:
        variables = {**os.environ, **self.variables(environment)}
        options = self.installed(environment).options
        needed, gpus = self.kind.gpus_needed(arguments, options), visible_gpus(variables)
        if not gpus:
            needed = 0
        with self._room(needed, len(gpus)), ExitStack() as stack:
            held: tuple[str, ...] = ()
            if needed:
                note = f"waiting for {needed} free GPUs"
                held = stack.enter_context(
                    lease(needed, gpus, lease_directory(), lambda: self.progress.note(note), self._require_open)
                )
                variables |= visibility(held)
            self.capture_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            variables.pop(CAPTURE_DIR_VARIABLE, None)
            if capturing:
                variables[CAPTURE_DIR_VARIABLE] = str(self.capture_dir)
            port = free_port()
            log = self._new_log(model, port)
            forwarded = (*self.variables(environment), *visibility(held), CAPTURE_DIR_VARIABLE)
            cidfile, kill = log.with_suffix(".cid"), kill_command(self.command)
            launch = with_environment(self.command, forwarded, variables, cidfile)
            command = ServerCommand(
                argv=[*launch, *self.kind.address(model, port), *arguments],
                environment=variables,
                url=f"http://127.0.0.1:{port}",
                health=self.kind.health,
                log=log,
                startup_timeout=self.startup_timeout,
                hint=self.kind.hint,
                container=(cidfile, kill) if kill else None,
            )
            self.progress.note(f"booting {self.kind.title} for {model.label}, log {command.log}")
            started = time.monotonic()
            with at_work(lease_directory()):
                server = Server(command, self._say_waiting(model))
            stack.callback(server.stop)
            self.progress.note(f"{self.kind.title} for {model.label} is ready after {time.monotonic() - started:.1f} s")
            handle = ServerHandle(url=server.url, model=model.label, log=server.log, pid=server.pid, gpus=held)
            with self._changed:
                running = _Running(key, server, handle, stack.pop_all(), users=1)
                self._running.append(running)
            return running

    @contextmanager
    def _room(self, needed: int, total: int) -> Iterator[None]:
        """Shut down servers that nobody uses, the oldest first, until a new one has room; hold the room while it boots.

        Wait for those that other threads use.

        Args:
            needed: how many GPUs it takes; 0 for a server on the CPU.
            total: how many there are.

        """
        with self._changed:
            while not self._has_room(needed, total) and (self._running or self._booting):
                idle = [running for running in self._running if not running.users]
                if idle:
                    self._stop(idle[0])
                else:
                    self._changed.wait()
            self._require_open()
            self._booting.append(needed)
        try:
            yield
        finally:
            with self._changed:
                self._booting.remove(needed)
                self._changed.notify_all()

    def _has_room(self, needed: int, total: int) -> bool:
        taken = [*self._booting, *(len(running.handle.gpus) for running in self._running)]
        return sum(taken) + needed <= total if needed else len(taken) < self.cpu_servers

    def _stop(self, running: _Running) -> None:
        self._running.remove(running)
        self.progress.note(f"shutting down {self.kind.title} for {running.handle.model}")
        running.leases.close()
        self._changed.notify_all()

    def _say_waiting(self, model: ModelSpec) -> _Waiting:
        return _Waiting(self.progress, f"{self.kind.title} for {model.label}", self._require_open)

    def _require_open(self) -> None:
        if self._ended:
            raise ServerError("the session ended while the server was being booted")

    def _new_log(self, model: ModelSpec, port: int) -> Path:
        self.log_dir.mkdir(parents=True, exist_ok=True)
        for old in sorted(self.log_dir.glob("*.log"), key=lambda path: path.stat().st_mtime)[:-_KEPT_LOGS]:
            old.unlink(missing_ok=True)
        name = "".join(c if c.isalnum() or c in ".-" else "-" for c in model.name.rstrip("/").rsplit("/", 1)[-1])
        return self.log_dir / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{port}.log"


@dataclass(slots=True)
class _Waiting:
    """Notes at intervals that a boot is still under way."""

    progress: Progress
    label: str
    check: Callable[[], None]
    said: float = 0.0

    def __call__(self, waited: float) -> None:
        self.check()
        if waited - self.said >= _SECONDS_BETWEEN_NOTES:
            self.said = waited
            self.progress.note(f"{self.label} is booting, {waited:.0f} s so far")


def default_command(kind: ServerKind) -> tuple[str, ...]:
    """Return the command for an engine in the same environment as pytest."""
    return (sys.executable, *kind.launch)


def _ask(kind: ServerKind, command: Sequence[str], variables: Mapping[str, str]) -> Installed:
    question = [*command[: -len(kind.launch)], "-m", "pytest_kld.hook", kind.seams]
    try:
        answer = subprocess.run(  # noqa: S603
            question,
            env=dict(variables),
            capture_output=True,
            text=True,
            timeout=_QUESTION_TIMEOUT_SECONDS,
            check=False,
        )
        told = json.loads(answer.stdout.strip().splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServerError(f"`{shlex.join(question)}` does not run: {error}. See {kind.command_option}.") from error
    except (IndexError, ValueError) as error:
        raise ServerError(
            f"`{shlex.join(question)}` failed with exit code {answer.returncode}: "
            f"{answer.stderr.strip()[-500:] or 'no output'}\n"
            f"Install pytest-kld where {kind.title} runs (`pip install pytest-kld`): the capture hook comes with it. "
            f"See {kind.command_option}."
        ) from error
    if told["protocol"] != PROTOCOL or told["pytest_kld"] != __version__:
        raise ServerError(
            f"pytest-kld {told['pytest_kld']} (protocol {told['protocol']}) is installed where {kind.title} runs, and "
            f"{__version__} (protocol {PROTOCOL}) here: install the same version on both sides."
        )
    if not any(package in told["versions"] for package in kind.packages):
        raise ServerError(
            f"`{command[0]}` has no {kind.title}. Install it there, name another with {kind.command_option}, or give "
            "--kld-engine=transformers."
        )
    if not told["hooked"]:
        raise ServerError(told["why_not"])
    return Installed(versions=told["versions"], devices=tuple(told["devices"]), options=told["options"])
