"""The quarantine: damaged entries of the cache, kept for inspection until something newer needs the space."""

from __future__ import annotations

import shutil
import time
import uuid
from contextlib import suppress
from typing import TYPE_CHECKING

from pytest_kld.errors import CacheError

if TYPE_CHECKING:
    from pathlib import Path

_MOST_ENTRIES = 8
_MOST_BYTES = 20_000_000_000
"""Bounds of the quarantine. The newest entry stays, whatever its size, until a capture needs its space."""


class Quarantine:
    """Damaged captures and scores in one directory, each named `ENTRY-TIME-RANDOM`."""

    def __init__(self, directory: Path) -> None:
        """Set the directory; it is created when the first entry arrives."""
        self.directory = directory

    def take(self, entry: Path) -> Path | None:
        """Move an entry here, remove the oldest ones beyond the bounds, and return its new path.

        Returns None if the entry no longer exists.

        Raises:
            CacheError: the entry cannot be moved.

        """
        taken = self.directory / f"{entry.name}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}"
        try:
            self.directory.mkdir(exist_ok=True)
            entry.replace(taken)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CacheError(
                f"the cache entry {entry} is damaged and cannot be moved to {self.directory}: {error}. Remove it by "
                "hand."
            ) from error
        with suppress(OSError):  # the time of arrival, by which the age is judged
            taken.touch()
        self._trim(_MOST_BYTES, _MOST_ENTRIES, least=1)
        return taken

    def shrink(self, size: int) -> int:
        """Remove the oldest entries until the others take at most `size` bytes, and return how many they take."""
        return self._trim(size, _MOST_ENTRIES, least=0)

    def _trim(self, size: int, count: int, *, least: int) -> int:
        kept, total = 0, 0
        for path in sorted(self.directory.glob("*"), key=_arrived, reverse=True):
            taken = _bytes_of(path)
            if kept >= least and (kept >= count or total + taken > size):
                _remove(path)
            else:
                kept, total = kept + 1, total + taken
        return total


def _arrived(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _bytes_of(path: Path) -> int:
    total = 0
    for file in path.rglob("*") if path.is_dir() else [path]:
        with suppress(OSError):  # another session is removing it
            total += file.stat().st_size
    return total


def _remove(path: Path) -> None:
    """Remove what can be removed: another session may be doing the same. What stays is tried again next time."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
