"""What a cache directory holds, and whether it is intact. Reads only; nothing is repaired."""

from __future__ import annotations

import json
import os
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from pytest_kld.captures.cache import use_and_bytes
from pytest_kld.captures.capture import Capture
from pytest_kld.captures.manifest import MANIFEST, read_manifest
from pytest_kld.errors import CaptureError, DamagedCaptureError
from pytest_kld.files import sha256_of_json

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Kind = Literal["capture", "partial", "scores", "quarantine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One entry of the cache.

    Attributes:
        kind: `capture`; `partial`: a capture in progress or an interrupted one; `scores`; `quarantine`.
        name: its name in the cache.
        path: where it is.
        model: the model's name; for scores, the candidate's. Empty if unknown.
        reference: for scores, the reference's name.
        engine: the engine that ran the model.
        dataset: the name of the text.
        windows: the number of windows; 0 if unknown.
        store: what a capture keeps.
        bytes: its size.
        used: when it was last used, in seconds since the epoch.
        damage: what is wrong with its description; empty if it can be read.

    """

    kind: Kind
    name: str
    path: Path
    model: str = ""
    reference: str = ""
    engine: str = ""
    dataset: str = ""
    windows: int = 0
    store: str = ""
    bytes: int = 0
    used: float = 0.0
    damage: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        used = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.used))
        return {**asdict(self), "path": str(self.path), "used": used}


def inventory(root: Path) -> list[Entry]:
    """Return every entry of a cache directory, the most recently used first. Contents are not checked."""
    return sorted(_entries(root), key=lambda entry: -entry.used)


def _entries(root: Path) -> Iterator[Entry]:
    for path in sorted(root.glob("captures/*")):
        if path.is_dir():
            yield _partial(path) if path.suffix == ".partial" else _capture(path)
    for path in sorted(root.glob("scores/*.safetensors")):
        yield _scores(path)
    for path in sorted(root.glob("quarantine/*")):
        yield _measured("quarantine", path, name=path.name)


def _measured(kind: Kind, path: Path, **known: Any) -> Entry:
    used, taken = use_and_bytes(path)
    return Entry(kind=kind, path=path, bytes=taken, used=used, **known)


def _partial(path: Path) -> Entry:
    done = sum(1 for file in path.rglob("*.safetensors") if file.stem.isdecimal())
    return _measured("partial", path, name=path.stem, windows=done)


def _capture(path: Path) -> Entry:
    try:
        with _unread(path / MANIFEST):
            manifest = read_manifest(path)
    except DamagedCaptureError as damage:
        return _measured("capture", path, name=path.name, damage=damage.what)
    return _measured(
        "capture",
        path,
        name=path.name,
        model=manifest["model"],
        engine=str((manifest["key"].get("engine") or {}).get("engine", "")),
        dataset=manifest["protocol"]["dataset"],
        windows=manifest["protocol"]["windows"],
        store=manifest["store"],
    )


def _scores(path: Path) -> Entry:
    try:
        with _unread(path):
            about = json.loads(_metadata(path)["about"])
        described = {
            "model": str(about["candidate"]["model"]),
            "reference": str(about["reference"]["model"]),
            "dataset": str(about["protocol"]["dataset"]),
            "windows": int(about["protocol"]["windows"]),
        }
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        return _measured("scores", path, name=path.stem, damage=f"{path} cannot be read ({error!r}).")
    return _measured("scores", path, name=path.stem, **described)


@contextmanager
def _unread(path: Path) -> Iterator[None]:
    """Keep a file's access time: it tells when the entry was last used, and a listing is no use."""
    before = path.stat() if path.exists() else None
    yield
    if before is not None:
        with suppress(OSError):  # another user's, or removed meanwhile
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def verify_capture(path: Path) -> None:
    """Check every byte of a capture in the cache, its head, and that its name is that of its key.

    Raises:
        CaptureError: what is wrong, and with which file.

    """
    capture = Capture.open(path)
    if sha256_of_json(capture.manifest["key"])[:32] != path.name:
        raise DamagedCaptureError(path, f"{path / MANIFEST} has a key that does not fit its directory's name.")
    capture.verify()


def key_of_scores(path: Path) -> str:
    """Return the digest of the key that a scores file states; empty if it states none.

    Raises:
        CaptureError: the file cannot be read.

    """
    try:
        return _metadata(path).get("key", "")
    except (OSError, ValueError) as error:
        raise CaptureError(f"{path} cannot be read: {error}") from error
