"""The journal of a capture in progress: the digest of each file, recorded when the file is complete.

A resumed recording uses a file only if the journal has its digest and the bytes still match it. The journal is in the
partial directory. It is removed before the capture is published, because the manifest then has the same digests.

    {"key": SHA-256 of the capture's key}
    {"name": "windows/00000.safetensors", "bytes": 4242, "sha256": …}     one line per file; a name's last line counts
"""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any

from pytest_kld.errors import CacheError
from pytest_kld.files import sha256_of_file, sha256_of_json

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

_FILE = "journal"


class Journal:
    """The files of one partial directory that were complete when they were written."""

    def __init__(self, partial: Path, key: dict[str, Any]) -> None:
        """Read what an interrupted session left, and remove what cannot be used. Creates no directory yet.

        Args:
            partial: the directory; nobody else writes there, because the caller holds the entry's lock.
            key: the key of the capture that is made. Files of another capture are removed.

        Raises:
            CacheError: something cannot be read or removed.

        """
        self.partial = partial
        self._head = {"key": sha256_of_json(key)}
        self._entries: dict[str, dict[str, Any]] = {}
        try:
            lines = _read_lines(partial / _FILE)
            if lines[:1] == [self._head]:
                for line in lines[1:]:
                    if line.keys() == {"name", "bytes", "sha256"} and isinstance(line["name"], str):
                        self._entries[line["name"]] = {"bytes": line["bytes"], "sha256": line["sha256"]}
                remove_others(partial, {_FILE, *self._entries})
            elif partial.exists():
                shutil.rmtree(partial)
        except OSError as error:
            raise CacheError(f"cannot resume in {partial}: {error}. Remove it by hand.") from error

    @property
    def names(self) -> list[str]:
        """Return the names of the files that were complete."""
        return list(self._entries)

    def intact(self, name: str) -> dict[str, Any] | None:
        """Return a file's entry for the manifest if it was complete and still has its digest. Reads the whole file."""
        entry, path = self._entries.get(name), self.partial / name
        try:
            same = (
                entry is not None and path.stat().st_size == entry["bytes"] and sha256_of_file(path) == entry["sha256"]
            )
        except OSError:
            return None
        return entry if same else None

    def add(self, name: str, entry: dict[str, Any]) -> None:
        """Record a file's entry for the manifest, right after the file was written.

        Raises:
            CacheError: the disk is full or the directory cannot be written.

        """
        path = self.partial / _FILE
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [] if path.exists() else [self._head]
            with path.open("a", encoding="utf-8") as file:
                # The line break comes first: a killed writer may have left half a line.
                file.writelines(f"\n{json.dumps(line)}" for line in [*lines, {"name": name, **entry}])
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CacheError(
                f"cannot write {path}: {error}. Free some disk space or choose another --kld-cache-dir, then run the "
                "same command again."
            ) from error
        self._entries[name] = entry


def remove_others(directory: Path, kept: Collection[str]) -> None:
    """Remove every file below a directory, such as a killed writer's temporary files, except those with these names.

    Args:
        directory: the directory.
        kept: the names of the files that stay, relative to the directory.

    Raises:
        OSError: a file cannot be removed.

    """
    for path in directory.rglob("*"):
        if not path.is_dir() and path.relative_to(directory).as_posix() not in kept:
            path.unlink()


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines that are whole; incomplete and damaged lines are skipped."""
    lines = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    for line in text.splitlines():
        try:
            read = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(read, dict):
            lines.append(read)
    return lines
