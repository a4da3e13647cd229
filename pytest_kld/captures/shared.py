"""The shared cache: captures of a team at a remote, which the local cache reads through and writes back to.

    pytest-kld.json          the marker of a shared cache: {"schema": 1}
    files/SHA256             the files of captures, each named by its digest, so captures share equal ones
    captures/NAME.json       the manifest of a capture; it is written last, so it is there only if all files are
    claims/NAME.json         a session is making this capture and rewrites its claim every few seconds

Nothing here needs a lock to be right: a file's name is its digest, and everything that is read is checked by it. Claims
only save the work of making a capture twice.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_kld.captures.arrival import MOST_MANIFEST_BYTES, Arrival
from pytest_kld.captures.cache import format_bytes
from pytest_kld.captures.manifest import manifest_bytes
from pytest_kld.errors import CacheWarning, DamagedCaptureError, RemoteError
from pytest_kld.plain import LINES, plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from pytest_kld.captures.cache import Cache
    from pytest_kld.captures.capture import Capture
    from pytest_kld.captures.remote import Remote
    from pytest_kld.progress import Progress

_MARKER = "pytest-kld.json"
_SCHEMA = 1
_MOST_SMALL_BYTES = 1 << 16
_AT_ONCE = 8
"""How many files are transferred at the same time."""
_BEAT_SECONDS = 15.0
_STALE_SECONDS = 120.0
"""A claim that did not change for so long belongs to a session that died. Measured with the waiting session's clock."""
_POLL_SECONDS = 5.0


@dataclass(slots=True, kw_only=True)
class SharedCache:
    """The second level of a cache.

    Attributes:
        remote: where it is.
        push: whether captures are written back.
        read: whether captures are taken from it; with --kld-refresh they are not.
        strict: whether every failure is an error. Otherwise only a remote that fails at its first use is one: later
            failures are warnings, and what cannot be had is captured here.
        progress: receives messages about transfers and waits.

    """

    remote: Remote
    push: bool
    read: bool = True
    strict: bool = False
    progress: Progress
    _met: bool = False
    _wrote: bool = False
    _damaged: set[str] = field(default_factory=set)

    def offers(self, entry: Path) -> bool:
        """Tell whether the remote has a capture, without fetching it.

        Raises:
            RemoteError: the remote cannot be used.

        """
        if not self.read:
            return False
        self._meet()
        return self.remote.read(f"captures/{entry.name}.json", MOST_MANIFEST_BYTES) is not None

    def pull(self, cache: Cache, entry: Path, label: str) -> bool:
        """Bring a capture into the local cache, if the remote has it. The caller holds the entry's lock.

        Args:
            cache: the local cache.
            entry: the directory of the capture's entry there.
            label: the Subject's name, for messages.

        Returns:
            Whether the entry is there now.

        Raises:
            RemoteError: the remote cannot be used at all, or, if `strict`, the capture cannot be had.
            DamagedCaptureError: the remote's capture is damaged, and `strict`.

        """
        if not self.read:
            return False
        self._meet()
        try:
            text = self.remote.read(f"captures/{entry.name}.json", MOST_MANIFEST_BYTES)
            if text is None:
                return False
            self._receive(cache, entry, label, text)
        except DamagedCaptureError as damage:
            self._damaged.add(entry.name)
            self._complain(damage, f"the capture of {label} at {self.remote.shown} is damaged: {damage.what}")
            return False
        except RemoteError as error:
            self._complain(error, f"the capture of {label} cannot be downloaded: {error}")
            return False
        return True

    @contextmanager
    def turn(self, cache: Cache, entry: Path, label: str) -> Iterator[bool]:
        """Wait until nobody else is making a capture, and claim it.

        Yields:
            Whether the capture must be made now. If not, it has arrived in the local cache.

        Raises:
            RemoteError: the remote cannot be written, and this is the first attempt.

        """
        if not self.read:
            yield True
            return
        name, mine = f"claims/{entry.name}.json", _Claim()
        held = arrived = False
        try:
            held, arrived = self._await_turn(cache, entry, label, name, mine)
        except RemoteError as error:
            if self.push and not self._wrote:
                raise
            self._complain(error, f"cannot see whether another session is making the capture of {label}: {error}")
        if not held:
            yield not arrived
            return
        with mine.beating(self.remote, name):
            # Another session may have finished between the look for the capture and the claim.
            yield not self._pull_again(cache, entry, label)

    def give(self, capture: Capture, verify: Callable[[], None]) -> None:
        """Write a capture back, unless the remote has it or --kld-cache-push is not given.

        Args:
            capture: a capture of the local cache.
            verify: checks the capture's contents.

        Raises:
            RemoteError: the remote cannot be written, and this is the first attempt, or `strict`.

        """
        if not self.push:
            return
        self._meet()
        name = capture.path.name
        try:
            manifest = f"captures/{name}.json"
            if self.read and name not in self._damaged and self.remote.size(manifest) is not None:
                return
            verify()
            self._send(capture)
            self._wrote = True
            self._damaged.discard(name)
        except RemoteError as error:
            if not self._wrote:
                raise
            self._complain(error, f"the capture of {capture.name} was made, but cannot be uploaded: {error}")

    def _meet(self) -> None:
        """Check once that the remote is a shared cache; with --kld-cache-push, make it one.

        Raises:
            RemoteError: it cannot be reached, or it is not a shared cache.

        """
        if self._met:
            return
        marker = self.remote.read(_MARKER, _MOST_SMALL_BYTES)
        if marker is None:
            if not self.push:
                raise RemoteError(
                    f"there is no shared cache at {self.remote.shown}: it has no {_MARKER}. Check the URL, or let a "
                    "session fill it with --kld-cache-push."
                )
            self.remote.create(_MARKER, json.dumps({"schema": _SCHEMA}).encode())
            self._wrote = True
        elif (schema := _schema_of(marker)) != _SCHEMA:
            raise RemoteError(
                f"{self.remote.shown}/{_MARKER} has schema {schema} instead of {_SCHEMA}: another version of "
                "pytest-kld filled this shared cache, or it is none. Give another --kld-cache-url."
            )
        self._met = True

    def _receive(self, cache: Cache, entry: Path, label: str, text: bytes) -> None:
        arrival = Arrival(cache, entry, text)
        needed = sum(known["bytes"] for known in arrival.missing.values())
        if needed > (free := shutil.disk_usage(cache.root).free):
            raise RemoteError(f"it needs {format_bytes(needed)}, but {cache.root} has {format_bytes(free)} free")
        self.progress.note(f"downloading the capture of {label} ({format_bytes(needed)}) from {self.remote.shown}")

        def bring(name: str) -> None:
            known = arrival.missing[name]
            arrival.put(name, lambda path: self.remote.download(f"files/{known['sha256']}", path, known["bytes"]))

        self._all_at_once(f"download {label}", [partial(bring, name) for name in sorted(arrival.missing)])
        arrival.publish()

    def _send(self, capture: Capture) -> None:
        files: Mapping[str, dict[str, Any]] = capture.manifest["files"]
        total = sum(known["bytes"] for known in files.values())
        self.progress.note(f"uploading the capture of {capture.name} ({format_bytes(total)}) to {self.remote.shown}")

        def bring(name: str) -> None:
            known = files[name]
            remote_name = f"files/{known['sha256']}"
            if capture.path.name in self._damaged or self.remote.size(remote_name) != known["bytes"]:
                self.remote.upload(remote_name, capture.path / name)

        self._all_at_once(f"upload {capture.name}", [partial(bring, name) for name in sorted(files)])
        capture.require_unchanged()
        self.remote.write(f"captures/{capture.path.name}.json", manifest_bytes(capture.manifest))

    def _all_at_once(self, what: str, transfers: list[Callable[[], None]]) -> None:
        pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="pytest-kld-transfer")
        try:
            with self.progress.task(what, len(transfers)) as task:
                for done in as_completed([pool.submit(transfer) for transfer in transfers]):
                    done.result()
                    task.advance()
        finally:
            pool.shutdown(cancel_futures=True)

    def _await_turn(self, cache: Cache, entry: Path, label: str, name: str, mine: _Claim) -> tuple[bool, bool]:
        """Return whether this session holds the claim, and whether the capture arrived. If neither, go ahead."""
        while True:
            if self.push and self.remote.create(name, mine.contents()):
                self._wrote = True
                return True, False
            waited = self._wait(name, label)
            if waited and self._pull_again(cache, entry, label):
                return False, True
            if not waited and not self.push:  # nobody is making it, and nobody could wait for this session
                return False, False

    def _wait(self, name: str, label: str) -> bool:
        """Wait until a claim ends or becomes stale, and return whether there was one."""
        seen, since = b"", time.monotonic()
        while (claim := self.remote.read(name, _MOST_SMALL_BYTES)) is not None:
            if not seen:
                self.progress.note(f"waiting for {_who(claim)}, which is making the capture of {label}")
            if claim != seen:
                seen, since = claim, time.monotonic()
            elif time.monotonic() - since > _STALE_SECONDS:
                self.progress.note(f"{_who(claim)} has stopped making the capture of {label}: it gives no sign of life")
                if not self.push:
                    return False
                self.remote.remove(name)
                return True
            time.sleep(_POLL_SECONDS)
        return bool(seen)

    def _pull_again(self, cache: Cache, entry: Path, label: str) -> bool:
        return entry.name not in self._damaged and self.pull(cache, entry, label)

    def _complain(self, error: Exception, text: str) -> None:
        """Report a failure that does not spoil a figure; raise it instead if `strict`."""
        if self.strict:
            raise error
        self.progress.note(text)
        warnings.warn(plain(text, keep=LINES), CacheWarning, stacklevel=3)


class _Claim:
    """A claim: who makes a capture, and a number that grows while that session lives."""

    def __init__(self) -> None:
        self._session, self._beat = uuid.uuid4().hex, 0

    def contents(self) -> bytes:
        self._beat += 1
        by = f"process {os.getpid()} on {socket.gethostname()}"
        return json.dumps({"session": self._session, "by": by, "beat": self._beat}).encode()

    @contextmanager
    def beating(self, remote: Remote, name: str) -> Iterator[None]:
        """Rewrite the claim every few seconds, and remove it at the end."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(_BEAT_SECONDS):
                with suppress(RemoteError):  # the next beat may come through; without one the others go ahead
                    remote.write(name, self.contents())

        thread = threading.Thread(target=beat, name="pytest-kld-claim", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            with suppress(RemoteError):  # it becomes stale
                remote.remove(name)


def _schema_of(marker: bytes) -> Any:
    try:
        return json.loads(marker)["schema"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return "none"


def _who(claim: bytes) -> str:
    try:
        by = json.loads(claim)["by"]
    except (ValueError, KeyError, TypeError, RecursionError):
        by = None
    return ascii(by)[1:-1][:100] if isinstance(by, str) else "another session"
