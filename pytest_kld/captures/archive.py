"""Archives: captures in one file, to carry them to another machine.

An archive is a tar file without compression. Its first member is an index, and the others follow in the index's order:

    pytest-kld.json              {"schema": 1, "files": [[name, bytes, SHA-256], …], "sha256": of the rest of the index}
    NAME/capture.json            the manifest of the capture whose entry in the cache is NAME
    NAME/head.safetensors        the files that the manifest lists, with the same sizes and digests
    NAME/windows/…

The same captures give the same bytes. An archive is read as the work of a stranger: every member must be the regular
file that the index announces, at its place, with its size and digest, and nothing else is in the archive. All of that
is checked before the first file is unpacked, and each file's digest again while it is unpacked.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import IO, TYPE_CHECKING

from pytest_kld.captures.arrival import MOST_MANIFEST_BYTES, Arrival, check_arriving
from pytest_kld.captures.manifest import MANIFEST, manifest_bytes
from pytest_kld.errors import ArchiveError, CacheError, DamagedCaptureError
from pytest_kld.files import atomic_path, json_bytes, sha256_of_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from pytest_kld.captures.cache import Cache
    from pytest_kld.captures.capture import Capture
    from pytest_kld.progress import Progress

_INDEX = "pytest-kld.json"
_SCHEMA = 1
_MOST_INDEX_BYTES = 256 << 20
_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 20
_NAME = re.compile(r"[0-9a-f]{32}")
_MOST_FILE_BYTES = 1 << 50


@dataclass(frozen=True, slots=True)
class Member:
    """One file of an archive.

    Attributes:
        capture: the name of the capture's entry in the cache.
        name: the file's name in the capture's directory.
        bytes: its size.
        sha256: its digest.
        offset: where its bytes start in the archive.

    """

    capture: str
    name: str
    bytes: int
    sha256: str
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Imported:
    """What became of one capture of an archive.

    Attributes:
        entry: its directory in the cache.
        model: its model, as its manifest names it.
        was_there: whether the cache had this capture already; then nothing was written.

    """

    entry: Path
    model: str
    was_there: bool


def export_captures(captures: Sequence[Capture], archive: Path, progress: Progress) -> int:
    """Write captures of a cache into one file, completely or not at all, and return its size in bytes.

    Args:
        captures: the captures; each has a manifest with a key, as those in a cache do.
        archive: the file.
        progress: notified of each file.

    Raises:
        DamagedCaptureError: a file of a capture is missing or differs from its manifest.
        ArchiveError: a capture has no key, because it is of the original layout, or the file cannot be written.

    """
    contents: list[tuple[Member, Callable[[], Iterator[bytes]]]] = []
    for name, capture in sorted({_entry_name(capture): capture for capture in captures}.items()):
        text = manifest_bytes(capture.manifest)
        manifest = Member(name, MANIFEST, len(text), hashlib.sha256(text).hexdigest())
        contents.append((manifest, partial(iter, [text])))
        for file, known in sorted(capture.manifest["files"].items()):
            member = Member(name, file, known["bytes"], known["sha256"])
            contents.append((member, partial(_read_capture, capture, member)))
    index = {"schema": _SCHEMA, "files": [[f"{m.capture}/{m.name}", m.bytes, m.sha256] for m, _ in contents]}
    text = json_bytes({**index, "sha256": sha256_of_json(index)})
    try:
        with atomic_path(archive) as temporary, temporary.open("wb") as target:
            _write_member(target, _INDEX, len(text), iter([text]))
            with progress.task("export", len(contents)) as task:
                for member, read in contents:
                    _write_member(target, f"{member.capture}/{member.name}", member.bytes, read())
                    task.advance()
            target.write(bytes(2 * _BLOCK))
            return target.tell()
    except CacheError as error:
        raise ArchiveError(f"cannot write {archive}: {error.__cause__}") from error.__cause__


def check_archive(archive: Path, progress: Progress) -> list[Member]:
    """Check every byte of an archive, and return its files. Writes nothing.

    Raises:
        ArchiveError: the file is not an archive, is incomplete or damaged, or has contents that its index does not
            announce; the message says where.

    """
    with _opened(archive) as file:
        members = _read_index(archive, file)
        with progress.task("check archive", len(members)) as task:
            for member in members:
                digest = hashlib.sha256()
                file.seek(member.offset)
                for chunk in _read_chunks(archive, file, member.bytes):
                    digest.update(chunk)
                if digest.hexdigest() != member.sha256:
                    raise ArchiveError(f"{archive} is damaged: {member.capture}/{member.name} has another SHA-256")
                task.advance()
    return members


def import_captures(archive: Path, cache: Cache, progress: Progress) -> list[Imported]:
    """Check an archive, and then add its captures to a cache. A capture that the cache has already is left as it is.

    Raises:
        ArchiveError: see `check_archive`; nothing was written.
        DamagedCaptureError: a manifest or a tensor is not what it should be; this capture was not added.
        CacheError: the disk is too small, or the cache cannot be written.

    """
    members = check_archive(archive, progress)
    by_capture: dict[str, list[Member]] = {}
    for member in members:
        by_capture.setdefault(member.capture, []).append(member)
    with _opened(archive) as file:
        entries = {name: cache.root / "captures" / name for name in by_capture}
        texts, models = {}, {}
        for name, (first, *files) in by_capture.items():  # all manifests before the first file is unpacked
            texts[name] = b"".join(_contents(archive, file, first))
            manifest = check_arriving(cache, entries[name], texts[name])
            listed = {file: (known["bytes"], known["sha256"]) for file, known in manifest["files"].items()}
            if listed != {member.name: (member.bytes, member.sha256) for member in files}:
                raise ArchiveError(f"{archive}: the manifest of {name} lists other files than the index")
            models[name] = str(manifest["model"])
        imported = []
        with progress.task("import", len(by_capture)) as task:
            for name, (_, *files) in by_capture.items():
                was_there = _import(archive, file, cache, entries[name], texts[name], files, progress)
                imported.append(Imported(entries[name], models[name], was_there))
                task.advance()
    return imported


def _import(
    archive: Path,
    file: IO[bytes],
    cache: Cache,
    entry: Path,
    text: bytes,
    files: Sequence[Member],
    progress: Progress,
) -> bool:
    note = f"waiting for another process, which is making {entry.name}"
    with cache.lock(entry, lambda: progress.note(note)):
        if cache.holds(entry / MANIFEST):
            return True
        arrival = Arrival(cache, entry, text)
        missing = [member for member in files if member.name in arrival.missing]
        cache.require_free(sum(member.bytes for member in missing), f"the import of {archive}", entry)
        for member in missing:
            arrival.put(member.name, partial(_unpack, archive, file, member))
        arrival.publish()
    return False


def _unpack(archive: Path, file: IO[bytes], member: Member, path: Path) -> None:
    with path.open("wb") as target:
        for chunk in _contents(archive, file, member):
            target.write(chunk)


def _entry_name(capture: Capture) -> str:
    if not capture.manifest["key"]:
        raise ArchiveError(f"{capture.path} is of the original layout and has no key; copy its directory instead")
    return sha256_of_json(capture.manifest["key"])[:32]


def _read_capture(capture: Capture, member: Member) -> Iterator[bytes]:
    """Yield a file's bytes, and fail at their end if their digest is not the manifest's."""
    digest, path = hashlib.sha256(), capture.path / member.name
    try:
        with path.open("rb") as source:
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                yield chunk
    except OSError as error:
        raise DamagedCaptureError(capture.path, f"cannot read {path}: {error}.") from error
    if digest.hexdigest() != member.sha256:
        raise DamagedCaptureError(capture.path, f"{path} is corrupt: its SHA-256 differs from the manifest's.")


def _write_member(target: IO[bytes], name: str, size: int, chunks: Iterable[bytes]) -> None:
    target.write(_header(name, size))
    for chunk in chunks:
        target.write(chunk)
    target.write(bytes(-size % _BLOCK))


def _header(name: str, size: int) -> bytes:
    """Return the header of a member; the same for the same file, whoever writes it and when."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member.tobuf(tarfile.GNU_FORMAT)


@contextmanager
def _opened(archive: Path) -> Iterator[IO[bytes]]:
    try:
        with archive.open("rb") as file:
            yield file
    except OSError as error:
        raise ArchiveError(f"cannot read the archive {archive}: {error.strerror or error}") from error


def _read_index(archive: Path, file: IO[bytes]) -> list[Member]:
    """Read the index, and check that the headers of all members, and nothing else, are where they must be.

    Raises:
        ArchiveError: see `check_archive`.

    """
    size = _size_of_index(archive, file)
    try:
        index = json.loads(b"".join(_read_chunks(archive, file, size)).decode())
        intact = index.pop("sha256") == sha256_of_json(index)
        members = [_member(*entry) for entry in index["files"]] if intact and index["schema"] == _SCHEMA else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArchiveError(f"{archive} is damaged, or it is not an archive of captures: {error!r}") from error
    if members is None:
        state = (
            f"its schema is {ascii(index['schema'])[:40]} instead of {_SCHEMA}" if intact else "its index is damaged"
        )
        raise ArchiveError(f"{archive}: {state}")
    _check_order(archive, members)
    offset, placed = _BLOCK + _padded(size), []
    for member in members:
        file.seek(offset)
        name = f"{member.capture}/{member.name}"
        if file.read(_BLOCK) != _header(name, member.bytes):
            raise ArchiveError(f"{archive} is damaged: {name} is not where the index says")
        placed.append(replace(member, offset=offset + _BLOCK))
        offset += _BLOCK + _padded(member.bytes)
    file.seek(offset)
    if file.read(2 * _BLOCK + 1) != bytes(2 * _BLOCK):
        raise ArchiveError(f"{archive} is incomplete, or has contents that its index does not announce")
    return placed


def _size_of_index(archive: Path, file: IO[bytes]) -> int:
    try:
        header = tarfile.TarInfo.frombuf(file.read(_BLOCK), "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise ArchiveError(f"{archive} is not an archive of captures: {error}") from error
    if header.name != _INDEX or not header.isreg() or not 0 <= header.size <= _MOST_INDEX_BYTES:
        raise ArchiveError(f"{archive} is not an archive of captures: its first file is not {_INDEX}")
    return int(header.size)


def _member(name: str, size: int, sha256: str) -> Member:
    """Return a file of the index.

    Raises:
        ValueError: an entry has another form; names of files in a capture are checked with its manifest.

    """
    capture, _, file = name.partition("/")
    if not _NAME.fullmatch(capture) or not file or len(name) > 99 or not name.isascii():
        raise ValueError(f"{ascii(name)[:80]} is not the name of a capture's file")
    if type(size) is not int or not 0 <= size <= (MOST_MANIFEST_BYTES if file == MANIFEST else _MOST_FILE_BYTES):
        raise ValueError(f"{ascii(name)[:80]}: {ascii(size)[:40]} is not its number of bytes")
    if not isinstance(sha256, str):
        raise ValueError(f"{ascii(name)[:80]}: expected a SHA-256")
    return Member(capture, file, size, sha256)


def _check_order(archive: Path, members: Sequence[Member]) -> None:
    """Check that no file is there twice, and that each capture's files follow its manifest."""
    named = [(member.capture, member.name) for member in members]
    in_order = sorted(named, key=lambda pair: (pair[0], pair[1] != MANIFEST, pair[1]))
    manifests = {capture for capture, name in named if name == MANIFEST}
    if named != in_order or len(set(named)) < len(named) or manifests != {capture for capture, _ in named}:
        raise ArchiveError(f"{archive}: its index has files twice, out of order, or without a {MANIFEST}")


def _padded(size: int) -> int:
    return size + -size % _BLOCK


def _contents(archive: Path, file: IO[bytes], member: Member) -> Iterator[bytes]:
    file.seek(member.offset)
    return _read_chunks(archive, file, member.bytes)


def _read_chunks(archive: Path, file: IO[bytes], size: int) -> Iterator[bytes]:
    while size:
        chunk = file.read(min(size, _CHUNK))
        if not chunk:
            raise ArchiveError(f"{archive} is incomplete")
        size -= len(chunk)
        yield chunk
