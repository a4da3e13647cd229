"""The library of captures: returns those in the cache, has the others recorded, and replaces damaged ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pytest_kld.captures.capture import Capture
from pytest_kld.captures.journal import Journal
from pytest_kld.captures.manifest import MANIFEST, SCHEMA
from pytest_kld.captures.recording import Recording, adopt_windows
from pytest_kld.errors import CacheWarning, CaptureError, DamagedCaptureError
from pytest_kld.files import sha256_of_json
from pytest_kld.plain import LINES, plain
from pytest_kld.subjects.model import is_capture
from pytest_kld.subjects.subject import ENGINE

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_kld.captures.cache import Cache
    from pytest_kld.captures.capture import Stamp, Store
    from pytest_kld.captures.shared import SharedCache
    from pytest_kld.engines import Engine
    from pytest_kld.progress import Progress
    from pytest_kld.subjects.model import ModelSpec
    from pytest_kld.subjects.subject import Subject
    from pytest_kld.text.windows import Windows

T = TypeVar("T")

Whereabouts = Literal["cached", "shared", "nowhere"]
"""Where a capture is: in the cache, in the shared cache only, or nowhere."""

_TRIES = 4
"""How many times work on captures is tried if captures turn out to be damaged or are replaced meanwhile."""


@dataclass(frozen=True, slots=True)
class _Obtained:
    """A capture that the library returned, and what is needed to record it again."""

    capture: Capture
    subject: Subject
    windows: Windows
    rounds: Sequence[Windows]
    key: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureLibrary:
    """Obtains captures of Subjects, and records each at most once.

    Attributes:
        cache: where captures are kept.
        engine: returns an engine by its name.
        make_room: called with an engine's name before it loads a model.
        identify: returns what determines a pinned model's bits, as JSON.
        store: what captures keep.
        progress: receives messages about what is recorded, awaited and replaced.
        strict: whether a damaged entry of the cache is an error.
        shared: a team's cache at a remote, or None.

    """

    cache: Cache
    engine: Callable[[str], Engine]
    make_room: Callable[[str], None]
    identify: Callable[[ModelSpec], dict[str, Any]]
    store: Store
    progress: Progress
    strict: bool = False
    shared: SharedCache | None = None
    _obtained: dict[Path, _Obtained] = field(default_factory=dict)
    _named: set[Path] = field(default_factory=set)
    _verified: dict[Path, Mapping[str, Stamp]] = field(default_factory=dict)

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
            subject: what is run, or a capture that the user named by its path.
            windows: what the capture must cover.
            rounds: the windows of every round, if captures grow in rounds. A capture of a later round is used as it is,
                and one of an earlier round is continued.
            before: called before a model is run; raises if the run would be useless.

        Raises:
            KLDError: the named capture covers other windows, the model cannot be run, or its files changed while it
                was captured.

        """
        path = subject.spec.path
        if path is not None and is_capture(path):
            self._named.add(path)
            return Capture.open(path, rounds[-1] if rounds else windows)
        subject = subject.pin()
        for covered in [*(more for more in reversed(rounds) if more.count > windows.count), windows]:
            key = self._key(subject, covered)
            entry = self.cache.capture_entry(key)
            if covered is not windows and self.shared is None and not self.cache.holds(entry / MANIFEST):
                continue
            with self.cache.lock(entry, lambda: self._say_waiting(subject)):
                capture = self._find(entry, subject, covered, key)
                if capture is None and covered is windows:
                    capture = self._make(entry, subject, windows, rounds, key, before)
            if capture is not None:
                self._obtained[entry] = _Obtained(capture, subject, covered, rounds, key)
                return capture
        raise AssertionError("the last entry is recorded if it is missing")

    def whereabouts(self, subject: Subject, windows: Windows) -> Whereabouts:
        """Tell where the capture of a pinned Subject is, without using it."""
        entry = self.cache.capture_entry(self._key(subject, windows))
        made, fresh = entry / MANIFEST, self.cache.refreshed_since
        if made.is_file() and (fresh is None or made.stat().st_mtime >= fresh):
            return "cached"
        return "shared" if self.shared is not None and self.shared.offers(entry) else "nowhere"

    def current(self, capture: Capture) -> Capture:
        """Return the current state of a capture: it may have been recorded again since it was obtained."""
        known = self._obtained.get(capture.path)
        return capture if known is None or capture.path in self._named else known.capture

    def verify(self, capture: Capture) -> None:
        """Check a capture's contents, once per session for the same files.

        Raises:
            DamagedCaptureError: see `Capture.verify`.

        """
        if capture.stamps and self._verified.get(capture.path) == capture.stamps:
            capture.require_unchanged()
            return
        capture.verify()
        self._verified[capture.path] = capture.stamps

    def mending(self, work: Callable[[], T]) -> T:
        """Do work on captures. If one in the cache turns out to be damaged, replace it and start the work again.

        Args:
            work: what is done; it gets its captures from `current`, and holds no lock when it raises.

        Raises:
            DamagedCaptureError: a capture that was named by its path is damaged, --kld-strict-cache is given, or a
                capture is damaged at the last try as well.

        """
        for _ in range(_TRIES - 1):
            try:
                return work()
            except DamagedCaptureError as damage:
                self._mend(damage)
        return work()

    def _mend(self, damage: DamagedCaptureError) -> None:
        """Replace a damaged capture by a good one, unless another process has already done so."""
        entry = damage.path
        known = self._obtained.get(entry)
        if known is None or entry in self._named:
            raise damage
        subject, windows, rounds, key = known.subject, known.windows, known.rounds, known.key
        with self.cache.lock(entry, lambda: self._say_waiting(subject)):
            capture = self._find(entry, subject, windows, key, thoroughly=True)
            if capture is None:
                capture = self._make(entry, subject, windows, rounds, key, lambda: None)
            else:
                self.progress.note(f"another process replaced the cache entry {entry}; continuing with the new one")
        self._obtained[entry] = _Obtained(capture, subject, windows, rounds, key)

    def _find(
        self, entry: Path, subject: Subject, windows: Windows, key: dict[str, Any], *, thoroughly: bool = False
    ) -> Capture | None:
        """Return the capture in the cache, or the one that the shared cache has."""
        capture = self._take(entry, windows, key, thoroughly=thoroughly)
        if self.shared is None:
            return capture
        if capture is None and self.shared.pull(self.cache, entry, subject.label):
            return self._take(entry, windows, key, thoroughly=thoroughly)
        if capture is not None:
            self.shared.give(capture, lambda: self.verify(capture))
        return capture

    def _make(
        self,
        entry: Path,
        subject: Subject,
        windows: Windows,
        rounds: Sequence[Windows],
        key: dict[str, Any],
        before: Callable[[], None],
    ) -> Capture:
        """Record a capture; with a shared cache, unless another session is doing so."""
        if self.shared is None:
            return self._record(entry, subject, windows, rounds, key, before)
        with self.shared.turn(self.cache, entry, subject.label) as mine:
            if not mine and (capture := self._take(entry, windows, key)) is not None:
                return capture
            capture = self._record(entry, subject, windows, rounds, key, before)
            self.shared.give(capture, lambda: self.verify(capture))
        return capture

    def _take(self, entry: Path, windows: Windows, key: dict[str, Any], *, thoroughly: bool = False) -> Capture | None:
        """Return the capture in the cache; None if it is missing, or if it was damaged and is now set aside."""
        if not self.cache.holds(entry / MANIFEST):
            if entry.exists() and self.cache.refreshed_since is None:
                self._set_aside(entry, DamagedCaptureError(entry, f"the capture {entry} has no {MANIFEST}."))
            return None
        try:
            capture = _open_entry(entry, windows, key)
            if thoroughly:
                self.verify(capture)
        except CaptureError as damage:
            self._set_aside(entry, damage)
            return None
        return capture

    def _set_aside(self, entry: Path, damage: CaptureError) -> None:
        """Move a damaged entry to the quarantine and report it.

        Raises:
            CaptureError: the damage, if --kld-strict-cache is given.

        """
        if self.strict:
            raise damage
        what = damage.what if isinstance(damage, DamagedCaptureError) else str(damage)
        say_set_aside(entry, self.cache.quarantine.take(entry), what, self.progress)

    def _record(
        self,
        entry: Path,
        subject: Subject,
        windows: Windows,
        rounds: Sequence[Windows],
        key: dict[str, Any],
        before: Callable[[], None],
    ) -> Capture:
        """Record a capture as a cache entry, starting with the windows of earlier rounds.

        Raises:
            CaptureError: the model's files changed while it was captured.

        """
        if self.cache.refreshed_since is not None:
            self.cache.discard(self.cache.partial(entry))
        before()
        for fewer in (fewer for fewer in rounds if fewer.count < windows.count):
            their_key = {**key, "token_ids_sha256": fewer.digest}
            smaller = self.cache.capture_entry(their_key)
            if self.cache.holds(smaller / MANIFEST):
                try:
                    adopt_windows(_open_entry(smaller, fewer, their_key), Journal(self.cache.partial(entry), key))
                except CaptureError as damage:  # it is set aside when it is itself requested
                    self.progress.note(f"{subject.label}: cannot continue a capture of fewer windows: {damage}")
        engine = self.engine(subject.engine)
        self.make_room(subject.engine)
        recording = Recording(engine=engine, subject=subject, windows=windows, store=self.store, key=key)
        recording.run(self.cache, entry, self.progress)
        if self.identify(subject.spec) != key["model"]:
            self.cache.discard(entry)
            raise CaptureError(
                f"the files of {subject.spec.label} changed while it was captured. The capture is removed; run again "
                "when they are complete."
            )
        if engine.fingerprint(subject) != key["engine"]:
            self.cache.discard(entry)
            raise CaptureError(
                f"the settings with which {subject.spec.label} runs changed while it was captured, as when its server "
                "is restarted with other flags. The capture is removed; run again."
            )
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
            CaptureError: the capture has fewer windows and was not obtained here.

        """
        if capture.windows >= windows.count:
            return capture
        subject = self.subject_of(capture)
        if subject is None:
            raise CaptureError(
                f"the capture {capture.path} has {capture.windows} windows, but {windows.count} are needed: give "
                f"--kld-windows=auto:{capture.windows}, or name a model that can be run"
            )
        return self.obtain(subject, windows, rounds=rounds, before=before)

    def subject_of(self, capture: Capture) -> Subject | None:
        """Return a capture's Subject, if the capture was obtained here and not named by its path."""
        known = self._obtained.get(capture.path)
        return None if known is None else known.subject

    def _key(self, subject: Subject, windows: Windows) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "model": self.identify(subject.spec),
            "engine": self.engine(subject.engine).fingerprint(subject),
            "path": subject.path,
            "axes": {name: value for name, value in subject.axes.items() if name != ENGINE},  # its key says so
            "token_ids_sha256": windows.digest,
            "store": self.store,
            **({} if subject.run == 1 else {"run": subject.run}),
            **({} if windows.decoding is None else {"decoding": windows.decoding.to_json()}),
        }

    def _say_waiting(self, subject: Subject) -> None:
        self.progress.note(f"waiting for another process, which is making the capture of {subject.label}")


def say_set_aside(entry: Path, taken: Path | None, what: str, progress: Progress) -> None:
    """Report a damaged entry: immediately, and in the warnings at the end, which xdist and -q show too."""
    where = "no longer exists" if taken is None else f"was moved to {taken}"
    text = f"the cache entry {entry} was damaged, {where} and is made again if it is needed. What was wrong: {what}"
    progress.note(text)
    warnings.warn(plain(text, keep=LINES), CacheWarning, stacklevel=2)


def _open_entry(entry: Path, windows: Windows, key: dict[str, Any]) -> Capture:
    """Open an entry of the cache.

    Raises:
        CaptureError: the entry is damaged, or it is another capture that was put under this name.

    """
    capture = Capture.open(entry, windows)
    if sha256_of_json(capture.manifest.get("key")) != sha256_of_json(key):
        raise DamagedCaptureError(
            entry,
            f"{entry / MANIFEST} has a key that does not fit its directory's name: it belongs to another capture.",
        )
    return capture
