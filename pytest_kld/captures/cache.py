"""The cache directory: content-addressed entries, made once, whole or not there."""

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
"""What was used within this time stays in a cache that is too large: another session may be at work on it."""
_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# A cache of pytest-kld. See https://bford.info/cachedir/\n"


class Cache:
    """Captures and scores under one root, each named by the digest of what determines it.

    Complete entries appear by a rename and disappear by one, so nobody finds half of one. The lock only saves the work
    of making the same entry twice.

        captures/NAME/                 a capture, see capture.py
        captures/NAME.partial/         one that is being made, or that was interrupted, see journal.py
        scores/NAME.safetensors        the scores of a pair, see scores.py
        quarantine/NAME-TIME           damaged entries, see quarantine.py
        discarded/                     entries on their way out; what a killed session leaves here is swept

    """

    def __init__(self, root: Path, refreshed_since: float | None = None) -> None:
        """Open the cache, making the directory if it is not there.

        Args:
            root: its directory.
            refreshed_since: entries made before this time, in seconds since the epoch, are made anew; None keeps all.

        Raises:
            CacheError: the directory cannot be made or written.

        """
        self.root = root
        self.refreshed_since = refreshed_since
        self.quarantine = Quarantine(root / "quarantine")
        try:
            root.mkdir(parents=True, exist_ok=True)
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
        """Tell whether an entry may be used, by its file (the manifest of a capture), and note the use."""
        try:
            known = made.stat()
        except OSError:
            return False
        there = stat.S_ISREG(known.st_mode)
        if there and (self.refreshed_since is None or known.st_mtime >= self.refreshed_since):
            self.mark_used(made)
            return True
        return False

    @contextmanager
    def lock(self, entry: Path, on_wait: Callable[[], None]) -> Iterator[None]:
        """Hold the right to make an entry. The operating system frees it when the holder dies.

        Args:
            entry: the entry's path.
            on_wait: called once when somebody else holds it, before waiting.

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
        """Return the directory in which an entry is being made; what an interrupted session left is found there."""
        return entry.with_name(f"{entry.name}.partial")

    def publish(self, entry: Path) -> None:
        """Give a finished partial directory its entry's name. An entry that has the name already gives way.

        Raises:
            CacheError: that cannot be done.

        """
        self.discard(entry)
        try:
            self.partial(entry).replace(entry)
        except OSError as error:
            raise CacheError(f"cannot complete the cache entry {entry}: {error}") from error

    def discard(self, path: Path) -> None:
        """Remove an entry, or a partial directory. It is renamed first, so that it vanishes as a whole.

        Raises:
            CacheError: it cannot be removed.

        """
        gone = self.root / "discarded" / f"{path.name}-{uuid.uuid4().hex}"
        try:
            gone.parent.mkdir(exist_ok=True)
            try:
                path.replace(gone)
            except FileNotFoundError:
                return
            gone.touch()  # its age is judged by this time, see sweep.py
            if gone.is_dir():
                shutil.rmtree(gone)
            else:
                gone.unlink()
        except OSError as error:
            raise CacheError(f"cannot remove the cache entry {path}: {error}. Remove it by hand.") from error

    def mark_used(self, made: Path) -> None:
        """Note that an entry is used now, in the access time of its file (the manifest of a capture)."""
        try:
            os.utime(made, ns=(time.time_ns(), made.stat().st_mtime_ns))
        except (FileNotFoundError, PermissionError):  # removed meanwhile, or somebody else's
            return

    def shrink(self, size: int) -> tuple[int, int]:
        """Remove the entries that were used least recently, until the others fit; those of the last 24 hours stay.

        What is in quarantine is removed first.

        Args:
            size: bytes that entries may take together.

        Returns:
            How many entries were removed, and the bytes that are left.

        Raises:
            CacheError: one cannot be removed.

        """
        entries: dict[Path, tuple[float, int]] = {}
        for path in [*self.root.glob("captures/*"), *self.root.glob("scores/*")]:
            if path.suffix != ".lock":
                entry = path.with_suffix("") if path.suffix == ".partial" else path
                (used, taken), (last, more) = entries.get(entry, (0.0, 0)), _use_and_bytes(path)
                entries[entry] = max(used, last), taken + more
        total, removed = sum(taken for _, taken in entries.values()), 0
        total += self.quarantine.shrink(size - total)
        for entry, (used, taken) in sorted(entries.items(), key=lambda item: item[1]):
            if total <= size or used > time.time() - _KEPT_SECONDS:
                break
            with suppress(Timeout), FileLock(_lock_file(entry)).acquire(timeout=0):
                self.discard(entry)
                self.discard(self.partial(entry))
                total, removed = total - taken, removed + 1
        return removed, total

    def require_free(self, needed_bytes: int, what: str, entry: Path) -> int:
        """Return the free bytes of the disk. If they are too few, the quarantine and the old entry are removed first.

        Args:
            needed_bytes: how many are needed.
            what: that needs them.
            entry: where it will be; what is there already is out of date.

        Raises:
            CacheError: fewer than needed; both are named.

        """
        free: int = shutil.disk_usage(self.root).free
        if needed_bytes > free:
            self.quarantine.shrink(0)
            self.discard(entry)
            free = shutil.disk_usage(self.root).free
        if needed_bytes > free:
            raise CacheError(
                f"{what} needs {format_bytes(needed_bytes)} and {self.root} has {format_bytes(free)} free. Free some "
                "disk space, choose another --kld-cache-dir, or fewer --kld-windows."
            )
        return free


def _lock_file(entry: Path) -> Path:
    return entry.with_name(f"{entry.name}.lock")


def _use_and_bytes(path: Path) -> tuple[float, int]:
    """Return when a file, or one of a directory, was read or written last, and their size."""
    used, taken = 0.0, 0
    for file in path.rglob("*") if path.is_dir() else [path]:
        with suppress(FileNotFoundError):  # somebody else removed it meanwhile
            known = file.stat()
            if stat.S_ISREG(known.st_mode):  # a directory's access time is of looking into it, as here
                used, taken = max(used, known.st_atime, known.st_mtime), taken + known.st_size
    return used, taken


def format_bytes(number: float) -> str:
    """Return a size in decimal units, as disks are sold and as file systems report it."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"
