"""Files that are whole or not there: unique temporary sibling, flush to disk, rename."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import uuid
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from pytest_kld.errors import CacheError, ReportError
from pytest_kld.plain import json_escaped

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


TEMPORARY_SUFFIX_BYTES = len(f"..{uuid.UUID(int=0).hex}.tmp")
"""How much longer than a file's name that of its temporary sibling is."""


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
    write_atomically(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    r"""Return JSON for people and programs, in UTF-8. What is no text is escaped: names that are not UTF-8 survive."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
    return f"{json_escaped(text)}\n".encode()


def what_is_there(path: Path) -> str | None:
    """Say what is at a path if it is neither nothing nor a regular file; links are not followed."""
    try:
        mode = path.lstat().st_mode
    except OSError:  # nothing is there, or nobody may look: whoever writes will learn why
        return None
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "a special file")


_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def write_report(path: Path, contents: bytes) -> None:
    """Write a report, whole or not at all. A regular file is replaced, anything else is refused.

    Raises:
        ReportError: a directory, device, pipe, socket or link has the name, or the file cannot be written.

    """
    if kind := what_is_there(path):
        raise ReportError(f"{path} is {kind} and not a regular file; give the report another path")
    try:
        write_atomically(path, contents)
    except CacheError as error:
        raise ReportError(str(error.__cause__)) from error.__cause__


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    """Return the SHA-256 of the canonical JSON (sorted keys, no spaces) of a value, in hexadecimal."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
