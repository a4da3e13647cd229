"""What is sent to a hooked server, and the files that come back: common to prefilling and decoding."""

from __future__ import annotations

import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import requests
from torch import Tensor

from pytest_kld.engines.served.kind import headers, without_key
from pytest_kld.engines.served.pieces import covers, first_position, origin_of, read_piece
from pytest_kld.errors import CaptureError, ServerError
from pytest_kld.hook.protocol import (
    CAPTURE_DIR_VARIABLE,
    ORIGIN,
    REQUEST_FILE,
    CaptureRequest,
    new_run,
    write_json_whole,
)
from pytest_kld.servers.deadline import within

if TYPE_CHECKING:
    from pytest_kld.engines.served.kind import ServerKind
    from pytest_kld.engines.served.pool import ServerHandle, ServerPool

T = TypeVar("T")

_ANSWER_TIMEOUT_SECONDS = 3600
"""How long a complete answer may take, however it arrives."""
_FILE_TIMEOUT_SECONDS = 120
"""How long a file may take to appear after its answer, or after the previous file: network file systems are slow."""
_HANDSHAKE_TIMEOUT_SECONDS = 10
"""The same for the handshake of a server booted here, which is written before the answer."""
_SECONDS_BETWEEN_LOOKS = 0.01
_REPORT_BYTES = 64 << 10
"""How much of a report of the hook is quoted."""
HANDSHAKE = "the handshake"
_NO_KEY = (requests.codes.unauthorized, requests.codes.forbidden)
_KEY_ADVICE = "the server requires a key: name the environment variable that holds it with --kld-api-key-env."


@dataclass(slots=True, kw_only=True)
class Connection:
    """A hooked server.

    Attributes:
        kind: the engine.
        url: the server's address.
        label: the user's name for the model.
        handshake: the hook's description of the server.
        capture_dir: the directory that both sides see.
        api_key: the server's API key, or None.
        pool: reports why our server failed; None for a server that we did not boot.
        server: the server, if we booted it.

    """

    kind: ServerKind
    url: str
    label: str
    handshake: dict[str, Any] = field(default_factory=dict)
    capture_dir: Path
    api_key: str | None
    pool: ServerPool | None
    server: ServerHandle | None

    def post(
        self,
        path: str,
        body: dict[str, Any],
        read: Callable[[Any], T],
        what: str,
        stands_for: Callable[[str], T | None] = lambda _: None,
    ) -> T:
        """Send a request and return its answer, read by `read`, or what an error message stands for.

        Raises:
            ServerError: the server does not answer, or not in the engine's form.

        """
        try:
            told = within(
                _ANSWER_TIMEOUT_SECONDS,
                lambda: requests.post(
                    f"{self.url}{path}", json=body, headers=headers(self.api_key), timeout=_ANSWER_TIMEOUT_SECONDS
                ),
            )
        except (requests.RequestException, TimeoutError) as error:
            raise self.failure(f"{what}: the server {self.url} does not answer: {error}") from error
        if told.status_code != requests.codes.ok:
            if (answer := stands_for(told.text)) is not None:
                return answer
            advice = _KEY_ADVICE if told.status_code in _NO_KEY else self.kind.hint(told.text)
            quoted = without_key(told.text, self.api_key)[:500] + (f"\nhint: {advice}" if advice else "")
            raise self.failure(f"{what}: the server answered {told.status_code}: {quoted}")
        try:
            return read(told.json())
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise self.failure(
                f"{what}: the server {self.url} did not answer as {self.kind.title} does "
                f"({type(error).__name__}: {without_key(str(error), self.api_key)}): "
                f"{without_key(told.text, self.api_key)[:500]}"
            ) from error

    def pieces(self, run: Path, index: int, count: int, first: int = 0) -> list[dict[str, Tensor]]:
        """Wait until the pieces of a window cover `count` positions from `first` on, and read them in order."""
        found: dict[int, Path] = {}

        def complete() -> bool:
            for path in run.glob(f"{index}.*.safetensors"):
                found[first_position(path)] = path
            return covers(found, first, count)

        self.wait_for(run, complete, f"window {index}")
        pieces, position = [], first
        for start in sorted(found):
            if start < position:
                continue  # the prefill was restarted: these rows are already covered
            self.require_origin(origin_of(found[start]), f"window {index}")
            piece = read_piece(found[start], "token_ids")
            pieces.append(piece)
            position = start + len(piece["token_ids"])
        return pieces

    @contextmanager
    def run(self, request: CaptureRequest) -> Iterator[Path]:
        """Begin a run: write what is to be captured into a new directory, which is removed at the end."""
        run = self.capture_dir / new_run()
        try:
            _make_private(run)
            write_json_whole(run / REQUEST_FILE, request.to_json())
        except OSError as error:
            raise ServerError(f"cannot write the capture directory {self.capture_dir}: {error}") from error
        try:
            yield run
        finally:
            # The hook may still be writing there, so the run is renamed first: nothing new can appear in it.
            ended = self.capture_dir / new_run()
            with suppress(OSError):
                run = run.replace(ended)
            shutil.rmtree(run, ignore_errors=True)

    def wait_for(self, run: Path, there: Any, what: str) -> None:
        """Wait for a file after its answer, and check for error reports; the hook writes those before the answer.

        Raises:
            CaptureError: the hook failed, or the file does not appear.

        """
        local = self.server is not None and what == HANDSHAKE
        timeout = _HANDSHAKE_TIMEOUT_SECONDS if local else _FILE_TIMEOUT_SECONDS
        deadline, seen = time.monotonic() + timeout, 0
        while True:
            complete = there()
            self.require_no_report(run, what)  # even if all files are there: they may be wrong
            if complete:
                return
            if not run.is_dir():
                raise CaptureError(f"{self.label}, {what}: the directory {run} was removed while it was in use")
            files = sum(1 for _ in run.glob("*"))
            if files != seen:
                deadline, seen = time.monotonic() + timeout, files
            if time.monotonic() > deadline or (what == HANDSHAKE and self._install_errors()):
                raise self.failure(self._missing(what))
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def require_no_report(self, run: Path, what: str) -> None:
        """Check that the hook reported no error.

        Raises:
            CaptureError: it did.

        """
        for report in run.glob("error-*.txt"):
            raise CaptureError(f"{self.label}, {what}: the hook failed in the server:\n{_read_report(report)}")

    def require_origin(self, origin: str | None, what: str) -> None:
        """Check that what arrived is from the process that wrote the handshake.

        Raises:
            CaptureError: it is from another, which may run another model.

        """
        if origin != self.handshake[ORIGIN]:
            raise CaptureError(
                f"{self.label}, {what}: another process answers at {self.url} than at the beginning. The server was "
                "restarted, or several servers share this address. What one process computed is kept; run again when "
                "only one answers."
            )

    def _missing(self, what: str) -> str:
        reports = "".join(f"\n{_read_report(path)}" for path in self._install_errors())
        if reports:
            return f"{self.label}: the hook could not be put into {self.kind.title}:{reports}"
        if what == HANDSHAKE:
            return (
                f"{self.label}: the server answered and the hook did not. It is not in that server, or writes to "
                f"another directory: start the server with {CAPTURE_DIR_VARIABLE} set to the directory that this "
                f"machine sees as {self.capture_dir} (--kld-capture-dir), and pytest-kld installed there. A "
                "server that runs as another user must be let in: see docs/threat-model.md. "
                f"{self.kind.hook_advice}"
            )
        return f"{self.label}: the server answered and the hook did not write {what}"

    def _install_errors(self) -> list[Path]:
        return sorted(self.capture_dir.glob("install-error-*.txt"))

    def failure(self, what: str) -> ServerError:
        """Return an error about the server, with the end of its log if we booted it."""
        if self.pool is None or self.server is None:
            return ServerError(what)
        return self.pool.failure(self.server, what)


def _make_private(run: Path) -> None:
    """Make a run's directory, which only this user can enter.

    If the capture directory hands down its group (setgid), that group can enter too: so the user lets in a server that
    runs as another user.
    """
    run.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    run.mkdir(mode=0o700)
    if run.parent.stat().st_mode & stat.S_ISGID:
        run.chmod(0o2770)


def _read_report(path: Path) -> str:
    """Return the text of a report of the hook, cut to a readable length."""
    try:
        with path.open("rb") as file:
            return file.read(_REPORT_BYTES).decode(errors="replace")
    except OSError as error:
        return f"(the report {path} cannot be read: {error})"
