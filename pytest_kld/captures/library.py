"""The library of captures: hands out those that the cache holds, and has the others recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_kld.captures.capture import MANIFEST, SCHEMA, Capture
from pytest_kld.captures.recording import Recording, adopt_windows
from pytest_kld.errors import CaptureError
from pytest_kld.subjects.model import is_capture

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_kld.captures.cache import Cache
    from pytest_kld.captures.capture import Store
    from pytest_kld.engines import Engine
    from pytest_kld.progress import Progress
    from pytest_kld.subjects.model import ModelSpec
    from pytest_kld.subjects.subject import Subject
    from pytest_kld.text.windows import Windows


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureLibrary:
    """Obtains captures of Subjects, each recorded at most once.

    Attributes:
        cache: where they are kept.
        engine: returns an engine by its name.
        identify: returns what determines a pinned model's bits, as JSON.
        store: what they keep.
        progress: told of what is recorded, and of waiting.

    """

    cache: Cache
    engine: Callable[[str], Engine]
    identify: Callable[[ModelSpec], dict[str, Any]]
    store: Store
    progress: Progress
    _subjects: dict[Path, Subject] = field(default_factory=dict)

    def obtain(
        self,
        subject: Subject,
        windows: Windows,
        *,
        rounds: Sequence[Windows] = (),
        before: Callable[[], None] = lambda: None,
    ) -> Capture:
        """Return a capture that covers windows.

        Args:
            subject: what is run, or a capture that the user names by its path.
            windows: what the capture must cover.
            rounds: the windows of every round, if captures grow in rounds; a capture of a later round is taken as
                it is, and one of an earlier round is continued.
            before: called before a model is run; raises if that would be in vain.

        Raises:
            KLDError: the capture named is not of these windows, the model cannot be run, or its files changed while
                it was captured.

        """
        path = subject.spec.path
        if path is not None and is_capture(path):
            return Capture.open(path, rounds[-1] if rounds else windows)
        subject = subject.pin()
        key = self._key(subject, windows)
        entry = self.cache.capture_entry(key)
        for more in (more for more in rounds if more.count > windows.count):
            larger = self._entry_of(key, more)
            if self.cache.holds(larger / MANIFEST):
                entry, windows = larger, more
        with self.cache.lock(entry, lambda: self._say_waiting(subject)):
            if not self.cache.holds(entry / MANIFEST):
                if entry.exists() or self.cache.refreshed_since is not None:
                    self.cache.discard(entry)
                before()
                for fewer in (fewer for fewer in rounds if fewer.count < windows.count):
                    smaller = self._entry_of(key, fewer)
                    if self.cache.holds(smaller / MANIFEST):
                        adopt_windows(Capture.open(smaller, fewer), self.cache.partial(entry))
                recording = Recording(
                    engine=self.engine(subject.engine), subject=subject, windows=windows, store=self.store, key=key
                )
                recording.run(self.cache, entry, self.progress)
                if self.identify(subject.spec) != key["model"]:
                    self.cache.discard(entry)
                    raise CaptureError(
                        f"the files of {subject.spec.label} changed while it was captured. The capture is removed; run "
                        "again when they are complete."
                    )
        self._subjects[entry] = subject
        return Capture.open(entry, windows)

    def extend(
        self,
        capture: Capture,
        windows: Windows,
        *,
        rounds: Sequence[Windows],
        before: Callable[[], None] = lambda: None,
    ) -> Capture:
        """Return a capture of the same Subject that covers at least these windows. See `obtain`.

        Raises:
            CaptureError: a capture of fewer windows that is not from here.

        """
        if capture.windows >= windows.count:
            return capture
        subject = self.subject_of(capture)
        if subject is None:
            raise CaptureError(
                f"the capture {capture.path} has {capture.windows} windows and {windows.count} are needed; give "
                "--kld-windows=auto:N with its number, or a model that can be run"
            )
        return self.obtain(subject, windows, rounds=rounds, before=before)

    def subject_of(self, capture: Capture) -> Subject | None:
        """Return what a capture is of, if it was obtained here and not named by its path."""
        return self._subjects.get(capture.path)

    def _key(self, subject: Subject, windows: Windows) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "model": self.identify(subject.spec),
            "engine": self.engine(subject.engine).fingerprint(subject),
            "path": subject.path,
            "axes": dict(subject.axes),
            "token_ids_sha256": windows.digest,
            "store": self.store,
        }

    def _entry_of(self, key: dict[str, Any], windows: Windows) -> Path:
        """Return the entry of the same capture over other windows."""
        return self.cache.capture_entry({**key, "token_ids_sha256": windows.digest})

    def _say_waiting(self, subject: Subject) -> None:
        self.progress.note(f"waiting for another process that makes the capture of {subject.label}")
