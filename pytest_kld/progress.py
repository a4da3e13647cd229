"""How long tasks report their progress. The terminal's side is in report/terminal.py."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """Counts the windows of one task."""

    def advance(self) -> None:
        """Record that one more window is done."""


class Progress(Protocol):
    """Receives the progress of long tasks."""

    def note(self, text: str) -> None:
        """Report one thing worth knowing."""

    def task(self, name: str, total: int, done: int = 0) -> AbstractContextManager[Task]:
        """Start a task of `total` windows, `done` of which are already complete."""


class Relay:
    """Passes on the progress of several threads: that of the main thread at once, that of others when it asks."""

    def __init__(self, progress: Progress) -> None:
        """Start with nothing to pass on."""
        self._progress = progress
        self._notes: deque[str] = deque()

    def note(self, text: str) -> None:
        """Pass on a note, or keep it for `flush`."""
        if threading.current_thread() is threading.main_thread():
            self.flush()
            self._progress.note(text)
        else:
            self._notes.append(text)

    @contextmanager
    def task(self, name: str, total: int, done: int = 0) -> Iterator[Task]:
        """Pass on a task; of one in another thread, only that it is done and how long it took."""
        if threading.current_thread() is threading.main_thread():
            self.flush()
            with self._progress.task(name, total, done) as task:
                yield task
            return
        started = time.monotonic()
        yield Silent()
        self.note(f"{name}: {total} windows, done in {time.monotonic() - started:.1f} s")

    def flush(self) -> None:
        """Pass on what other threads have reported since. Only the main thread may call this."""
        while self._notes:
            self._progress.note(self._notes.popleft())


class Silent:
    """Discards all progress."""

    def note(self, text: str) -> None:
        """Discard a note."""

    @contextmanager
    def task(self, name: str, total: int, done: int = 0) -> Iterator[Silent]:  # noqa: ARG002
        """Start a task without reporting it."""
        yield self

    def advance(self) -> None:
        """Do nothing."""
