"""Files that are whole or not there: unique temporary sibling, flush to disk, rename."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from pytest_kld.errors import CacheError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same directory; on success it takes the name `path`, else it is removed.

    Raises:
        CacheError: the disk is full or the directory cannot be written.

    """
    from safetensors import SafetensorError  # not needed where the plugin is only loaded

    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise CacheError(
            f"cannot write {path}: {error}. Nothing half-written is kept; what was complete stays and is reused. "
            "Free some disk space or choose another --kld-cache-dir, then run the same command again."
        ) from error
    finally:
        with suppress(OSError):  # it is not there, or its directory is none: the error above says why
            temporary.unlink()


def write_atomically(path: Path, contents: bytes) -> None:
    """Write a file, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(contents)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all. Non-finite numbers are refused: JSON has none."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
    write_atomically(path, f"{text}\n".encode())


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    """Return the SHA-256 of the canonical JSON (sorted keys, no spaces) of a value, in hexadecimal."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
