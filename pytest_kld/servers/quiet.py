"""Who may work on this machine at the same time: captures and comparisons do, a measurement of speed wants to be alone.

All sessions on the machine share one lock. Work holds it together with other work; a measurement of speed holds it
alone. Whoever waits for GPUs must not hold it, or two sessions could wait for each other.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LOCK = "quiet.lock"


@contextmanager
def at_work(directory: Path) -> Iterator[None]:
    """Work while the context lasts; wait for a measurement of speed to end first.

    Args:
        directory: where the lock is; see `leases.lease_directory`.

    """
    with _held(directory, fcntl.LOCK_SH, lambda: None):
        yield


@contextmanager
def alone(directory: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Be the only one at work while the context lasts.

    Args:
        directory: where the lock is.
        on_wait: called once if others are at work.

    """
    with _held(directory, fcntl.LOCK_EX, on_wait):
        yield


@contextmanager
def _held(directory: Path, kind: int, on_wait: Callable[[], None]) -> Iterator[None]:
    descriptor = _open(directory / _LOCK)
    try:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(descriptor, kind)
        yield
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    """Open the lock for reading, which is enough for both kinds of lock: another user's file cannot be written."""
    while True:
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            with suppress(FileExistsError):
                os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
