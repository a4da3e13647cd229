"""Writes files completely or not at all: unique temporary sibling, flush to disk, rename."""

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
"""How many bytes longer the name of a temporary sibling is than the file's own name."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same directory; rename it to `path` on success, else remove it.

    Raises:
        CacheError: the disk is full or the directory cannot be written.

    """
    from safetensors import SafetensorError  # not needed when the plugin is only loaded

    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise CacheError(
            f"cannot write {path}: {error}. Incomplete files are removed; complete ones are kept and reused. "
            "Free some disk space or choose another --kld-cache-dir, then run the same command again."
        ) from error
    finally:
        with suppress(OSError):  # the file is missing, or its parent is not a directory: the error above says why
            temporary.unlink()


def write_atomically(path: Path, contents: bytes) -> None:
    """Write a file completely or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(contents)


def write_json(path: Path, value: Any) -> None:
    """Write JSON completely or not at all. Non-finite numbers are rejected, because JSON has none."""
    write_atomically(path, json_bytes(value))


def json_bytes(value: Any, *, sort: bool = True) -> bytes:
    r"""Return indented JSON in UTF-8, with sorted names unless their order means something.

    Unsafe characters are escaped, so that names that are not UTF-8 survive.
    """
    text = json.dumps(value, indent=2, sort_keys=sort, allow_nan=False, ensure_ascii=False)
    return f"{json_escaped(text)}\n".encode()


def what_is_there(path: Path) -> str | None:
    """Describe what is at a path; None for a regular file or if nothing is there. Links are not followed."""
    try:
        mode = path.lstat().st_mode
    except OSError:  # nothing is there, or access is denied: the write will say why
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
    """Write a report completely or not at all. A regular file is replaced; anything else is rejected.

    Raises:
        ReportError: the path is a directory, device, pipe, socket or link, or the file cannot be written.

    """
    if kind := what_is_there(path):
        raise ReportError(f"{path} is {kind} and not a regular file; give the report another path")
    try:
        write_atomically(path, contents)
    except CacheError as error:
        raise ReportError(str(error.__cause__)) from error.__cause__


def append_report(path: Path, contents: bytes) -> None:
    """Append to a file that others write to as well. It is made if it is missing.

    Raises:
        ReportError: the file cannot be written.

    """
    try:
        with path.open("ab") as file:
            file.write(contents)
    except OSError as error:
        raise ReportError(str(error)) from error


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    """Return the SHA-256 of a value's canonical JSON (sorted keys, no spaces), in hexadecimal."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
