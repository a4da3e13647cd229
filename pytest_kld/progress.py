"""How long tasks report their progress. The terminal's side is in report/terminal.py."""

from __future__ import annotations

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
