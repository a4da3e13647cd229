"""Arrival: a capture from elsewhere enters the cache, checked as the work of a stranger.

Its manifest decides nothing before it is checked: it may list only the files that a capture of its store and windows
has, and its key must be the one that names the entry. A file enters the journal of the partial directory once its
digest is right, so an interrupted arrival goes on where it stopped. The entry is published when all files are there and
every tensor has its shape.
"""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, Any

from pytest_kld.captures.capture import Capture
from pytest_kld.captures.journal import Journal, remove_others
from pytest_kld.captures.manifest import EXPERTS_FILE, HEAD_FILE, MANIFEST, parse_manifest, write_manifest
from pytest_kld.errors import CacheError, CaptureError, DamagedCaptureError
from pytest_kld.files import atomic_path, sha256_of_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_kld.captures.cache import Cache

MOST_MANIFEST_BYTES = 64 << 20
"""A manifest of 100,000 windows has fewer bytes."""


class Arrival:
    """One capture that is brought into the cache. The caller holds the entry's lock.

    Attributes:
        entry: the entry's directory.
        missing: size and digest of each file that has not arrived yet, by name.

    """

    def __init__(self, cache: Cache, entry: Path, text: bytes) -> None:
        """Check the manifest. Nothing is written yet, but files of another interrupted capture are removed.

        Args:
            cache: the cache.
            entry: the entry's directory.
            text: the contents of the arriving capture's `capture.json`.

        Raises:
            DamagedCaptureError: the manifest is damaged or invalid, or belongs to another entry.

        """
        self._cache, self.entry = cache, entry
        self._manifest = check_arriving(cache, entry, text)
        self._partial = cache.partial(entry)
        self._journal = Journal(self._partial, self._manifest["key"])
        files = self._manifest["files"]
        self.missing: dict[str, dict[str, Any]] = {
            name: known for name, known in files.items() if self._journal.intact(name) != known
        }
        self._lock = Lock()

    def put(self, name: str, write: Callable[[Path], None]) -> None:
        """Receive one of the missing files. Several threads may call this for different files.

        Args:
            name: the file's name.
            write: writes the file to a path.

        Raises:
            DamagedCaptureError: the file has another size or digest.
            CacheError: the disk is full.

        """
        expected = self.missing[name]
        with atomic_path(self._partial / name) as temporary:
            write(temporary)
            if temporary.stat().st_size != expected["bytes"] or sha256_of_file(temporary) != expected["sha256"]:
                raise DamagedCaptureError(self.entry, f"{name} arrived for {self.entry.name} with another SHA-256.")
        with self._lock:
            self._journal.add(name, expected)

    def publish(self) -> None:
        """Check the tensors of all files and the head, and make the capture an entry of the cache.

        Raises:
            DamagedCaptureError: a file holds other tensors than the manifest says, or the head is not the engine's; all
                files are removed.
            CacheError: the entry cannot be completed.

        """
        try:
            Capture(path=self._partial, manifest=self._manifest).check_contents()
        except CaptureError:
            self._cache.discard(self._partial)
            raise
        write_manifest(self._partial, self._manifest)
        try:
            remove_others(self._partial, {MANIFEST, *self._manifest["files"]})
        except OSError as error:
            raise CacheError(f"cannot complete the cache entry {self.entry}: {error}") from error
        self._cache.publish(self.entry)


def check_arriving(cache: Cache, entry: Path, text: bytes) -> dict[str, Any]:
    """Return the manifest of a capture that arrives for an entry of the cache. See `Arrival`.

    Raises:
        DamagedCaptureError: the manifest is damaged or invalid, lists other files than a capture has, or belongs to
            another entry.

    """
    manifest = parse_manifest(text, entry)
    if cache.capture_entry(manifest["key"]) != entry:
        raise DamagedCaptureError(entry, f"the capture that arrived for {entry.name} has the key of another.")
    expected = {*manifest["window_files"], *([HEAD_FILE] if manifest["store"] == "hidden" else [])}
    if (routing := manifest["routing"]) is not None and routing["unobserved"] is None:
        expected.add(EXPERTS_FILE)
    if others := sorted(manifest["files"].keys() - expected):
        raise DamagedCaptureError(entry, f"the capture that arrived for {entry.name} has a file {others[0]!a}.")
    return manifest
