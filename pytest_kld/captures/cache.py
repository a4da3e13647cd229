"""The cache directory: content-addressed entries, each written once and either complete or absent."""

from __future__ import annotations

import os
import shutil
import stat
import time
import uuid
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from pytest_kld.captures.quarantine import Quarantine
from pytest_kld.errors import CacheError
from pytest_kld.files import sha256_of_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_KEPT_SECONDS = 24 * 3600
"""Entries used within this time stay, even if the cache is too large: another session may be using them."""
_CLOCK_SLACK_SECONDS = 60
"""How far the clock of a file server may be ahead of ours."""
_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# A cache of pytest-kld. See https://bford.info/cachedir/\n"


class Cache:
    """Captures and scores under one root, each named by a digest of what determines its contents.

    Entries are added and removed by a rename, so no process sees an incomplete one. The lock only saves the work of
    making the same entry twice.

        captures/NAME/                 a capture, see capture.py
        captures/NAME.partial/         a capture in progress, or an interrupted one, see journal.py
        scores/NAME.safetensors        the scores of a pair, see scores.py
        quarantine/NAME-TIME           damaged entries, see quarantine.py
        discarded/                     entries that are being removed; sweep.py removes what a killed session left here

    """

    def __init__(self, root: Path, refreshed_since: float | None = None) -> None:
        """Open the cache, and create its directory if it is missing.

        Args:
            root: its directory.
            refreshed_since: entries made before this time, in seconds since the epoch, are made again; None keeps all.

        Raises:
            CacheError: the directory cannot be created or written.

        """
        self.root = root
        self.refreshed_since = refreshed_since
        self.quarantine = Quarantine(root / "quarantine")
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            tag = root / "CACHEDIR.TAG"
            probe = root / f".{uuid.uuid4().hex}.tmp"
            probe.write_text(_TAG)
            probe.replace(tag)
        except OSError as error:
            raise CacheError(
                f"the cache directory {root} cannot be written: {error}. Choose another with --kld-cache-dir."
            ) from error

    def capture_entry(self, key: dict[str, Any]) -> Path:
        """Return the directory of the capture with this key."""
        return self.root / "captures" / sha256_of_json(key)[:32]

    def scores_entry(self, key: dict[str, Any]) -> Path:
        """Return the file of the scores with this key."""
        return self.root / "scores" / f"{sha256_of_json(key)[:32]}.safetensors"

    def holds(self, made: Path) -> bool:
        """Tell whether an entry may be used, and record the use.

        Args:
            made: the entry's file; for a capture, its manifest.

        """
        try:
            known = made.stat()
        except OSError:
            return False
        # An entry from the future was made before a clock was set back, and not since this refresh began.
        fresh, now = self.refreshed_since, time.time() + _CLOCK_SLACK_SECONDS
        if stat.S_ISREG(known.st_mode) and (fresh is None or fresh <= known.st_mtime <= now):
            self.mark_used(made)
            return True
        return False

    @contextmanager
    def lock(self, entry: Path, on_wait: Callable[[], None]) -> Iterator[None]:
        """Hold an entry's lock while the entry is made. The operating system releases it if the process dies.

        Args:
            entry: the entry's path.
            on_wait: called once before waiting, if another process holds the lock.

        Raises:
            CacheError: the lock cannot be created.

        """
        lock = FileLock(_lock_file(entry))
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                on_wait()
                lock.acquire()
        except OSError as error:
            raise CacheError(f"cannot lock {entry}: {error}. Choose another --kld-cache-dir.") from error
        try:
            yield
        finally:
            lock.release()

    def partial(self, entry: Path) -> Path:
        """Return the directory in which an entry is made. It may hold what an interrupted session left."""
        return entry.with_name(f"{entry.name}.partial")

    def publish(self, entry: Path) -> None:
        """Rename a finished partial directory to its entry's name. It replaces an existing entry of that name.

        Raises:
            CacheError: the old entry cannot be removed, or the directory cannot be renamed.

        """
        self.discard(entry)
        try:
            self.partial(entry).replace(entry)
        except OSError as error:
            raise CacheError(f"cannot complete the cache entry {entry}: {error}") from error

    def discard(self, path: Path) -> None:
        """Remove an entry or a partial directory. It is renamed first, so that it disappears in one step.

        Raises:
            CacheError: the path cannot be removed.

        """
        gone = self.root / "discarded" / f"{path.name}-{uuid.uuid4().hex}"
        try:
            gone.parent.mkdir(exist_ok=True)
            try:
                path.replace(gone)
            except FileNotFoundError:
                return
            gone.touch()  # sweep.py judges its age by this time
            if gone.is_dir():
                shutil.rmtree(gone)
            else:
                gone.unlink()
        except OSError as error:
            raise CacheError(f"cannot remove the cache entry {path}: {error}. Remove it by hand.") from error

    def mark_used(self, made: Path) -> None:
        """Record that an entry is used now, in the access time of its file (for a capture, its manifest)."""
        try:
            os.utime(made, ns=(time.time_ns(), made.stat().st_mtime_ns))
        except (FileNotFoundError, PermissionError):  # removed meanwhile, or another user's
            return

    def entries(self) -> dict[Path, tuple[float, int]]:
        """Return when each entry was last used, in seconds since the epoch, and how many bytes it takes.

        A capture and its partial directory are one entry.
        """
        entries: dict[Path, tuple[float, int]] = {}
        for path in [*self.root.glob("captures/*"), *self.root.glob("scores/*")]:
            if path.suffix != ".lock":
                entry = path.with_suffix("") if path.suffix == ".partial" else path
                (used, taken), (last, more) = entries.get(entry, (0.0, 0)), use_and_bytes(path)
                entries[entry] = max(used, last), taken + more
        return entries

    def remove(self, entry: Path, *, partial_only: bool = False) -> bool:
        """Remove an entry and its partial directory, unless another process is making it; return whether it is gone.

        Args:
            entry: the entry's path.
            partial_only: whether the entry itself stays.

        Raises:
            CacheError: the entry cannot be removed.

        """
        with suppress(Timeout), FileLock(_lock_file(entry)).acquire(timeout=0):
            if not partial_only:
                self.discard(entry)
            self.discard(self.partial(entry))
            return True
        return False

    def shrink(self, size: int) -> tuple[int, int]:
        """Remove the least recently used entries until the others fit. Entries used in the last 24 hours stay.

        Entries in quarantine are removed first.

        Args:
            size: the number of bytes that all entries together may take.

        Returns:
            The number of entries removed, and the number of bytes that the others take.

        Raises:
            CacheError: an entry cannot be removed.

        """
        entries = self.entries()
        total, removed = sum(taken for _, taken in entries.values()), 0
        total += self.quarantine.shrink(size - total)
        for entry, (used, taken) in sorted(entries.items(), key=lambda item: item[1]):
            if total <= size or used > time.time() - _KEPT_SECONDS:
                break
            if self.remove(entry):
                total, removed = total - taken, removed + 1
        return removed, total

    def require_free(self, needed_bytes: int, what: str, entry: Path) -> int:
        """Return the number of free bytes on the disk. If it is too small, remove the quarantine and the old entry.

        Args:
            needed_bytes: the number of bytes needed.
            what: what needs them, for the message.
            entry: the path of the new entry; an entry that is there already is out of date.

        Raises:
            CacheError: too few bytes are free; the message gives both numbers.

        """
        free: int = shutil.disk_usage(self.root).free
        if needed_bytes > free:
            self.quarantine.shrink(0)
            self.discard(entry)
            free = shutil.disk_usage(self.root).free
        if needed_bytes > free:
            raise CacheError(
                f"{what} needs {format_bytes(needed_bytes)}, but {self.root} has {format_bytes(free)} free. Free some "
                "disk space, choose another --kld-cache-dir, or measure fewer --kld-windows."
            )
        return free


def _lock_file(entry: Path) -> Path:
    return entry.with_name(f"{entry.name}.lock")


def use_and_bytes(path: Path) -> tuple[float, int]:
    """Return when a file, or any file in a directory, was last read or written, and the total size."""
    used, taken = 0.0, 0
    for file in path.rglob("*") if path.is_dir() else [path]:
        with suppress(FileNotFoundError):  # another process removed it meanwhile
            known = file.stat()
            if stat.S_ISREG(known.st_mode):  # listing a directory, as here, changes its access time
                used, taken = max(used, known.st_atime, known.st_mtime), taken + known.st_size
    return used, taken


def format_bytes(number: float) -> str:
    """Return a size in decimal units, in which disks are sold and file systems report sizes."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"
