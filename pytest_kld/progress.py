"""What long work tells about itself. The terminal's side is in report/terminal.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """Counts the windows of one piece of work."""

    def advance(self) -> None:
        """Say that one more window is done."""


class Progress(Protocol):
    """Where long work reports to."""

    def note(self, text: str) -> None:
        """Say one thing worth knowing."""

    def task(self, name: str, total: int, done: int = 0) -> AbstractContextManager[Task]:
        """Begin a piece of work of `total` windows, `done` of which are there already."""


class Silent:
    """Reports to nobody."""

    def note(self, text: str) -> None:
        """Drop a note."""

    @contextmanager
    def task(self, name: str, total: int, done: int = 0) -> Iterator[Silent]:  # noqa: ARG002
        """Begin a piece of work in silence."""
        yield self

    def advance(self) -> None:
        """Do nothing."""
