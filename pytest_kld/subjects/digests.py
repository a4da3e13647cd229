"""Digests of model files: of every byte, or of a sample if the file is large; remembered between sessions."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pytest_kld.errors import CacheError, ModelError
from pytest_kld.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

Hash = Literal["sample", "full"]
SMALL_BYTES = 64 << 20
"""Files up to this size are read completely in both modes: configs, tokenizers, indices, code, small weights."""
SAFETENSORS_HEADER_BYTES = 16 << 20
"""The most that is read of a safetensors header, regardless of the length it claims."""
OTHER_HEAD_BYTES = 8 << 20
"""The number of bytes read from the start of a large file of another format."""
TENSOR_BYTES = 4 << 10
"""The most that is read of each tensor: all of a small one (scales, norms), the middle of a larger one."""
MOST_TENSORS = 4096
"""The most tensors of a file that are sampled; if it has more, a fixed pseudo-random choice of them."""
BLOCK_BYTES, BLOCKS = 16 << 10, 128
"""Size and number of the blocks sampled at even distances over a large file, from its first byte to its last."""
SAMPLED_BYTES = SAFETENSORS_HEADER_BYTES + MOST_TENSORS * TENSOR_BYTES + BLOCKS * BLOCK_BYTES
"""The most that is read of a large file in mode `sample`: 34 MiB. For shards of real models it is 3 to 8 MiB."""

MEMO = "file-digests-1.json"
"""The memo's name in the cache directory. Its number changes when the sampling changes."""
_RACY_NS = 60 * 10**9
"""A file that changed this recently is not remembered: it could change again with the same times."""
_REMEMBERED = 10_000
_TOLD_BYTES = 10 * 10**9
_CHUNK_BYTES = 1 << 20
_THREADS = 8
_TRIES = 3

_Status = list[int]
"""Size, mtime, ctime (both in ns), inode and device of a file."""


@dataclass(slots=True)
class FileDigests:
    """Computes digests of files, and remembers them.

    Attributes:
        kind: `sample` reads at most `SAMPLED_BYTES` of a file above `SMALL_BYTES`; `full` reads every byte.
        memo: JSON file that stores the digests; None stores nothing.
        fresh: ignore the stored digests.
        note: receives a message before long reads.

    """

    kind: Hash = "sample"
    memo: Path | None = None
    fresh: bool = False
    note: Callable[[str], None] = field(default=lambda _: None)

    def of(self, paths: Sequence[Path]) -> list[str]:
        """Return the SHA-256 of each file, in hexadecimal. Only files whose digest is not stored are read.

        Raises:
            ModelError: a file cannot be read, or changes while it is being read.

        """
        known = {} if self.fresh else self._remembered()
        keys = [(os.path.realpath(path), _status(path)) for path in paths]
        methods = [self._method(status) for _, status in keys]
        found = [_lookup(known, key, status, method) for (key, status), method in zip(keys, methods, strict=True)]
        missing = [index for index, digest in enumerate(found) if digest is None]
        if (size := sum(keys[index][1][0] for index in missing)) > _TOLD_BYTES and self.kind == "full":
            self.note(f"reading {size / 1e9:.1f} GB of model files to identify them (--kld-hash=full)")
        fresh: dict[str, dict[str, Any]] = {}
        for index, (digest, status, settled) in zip(
            missing, self._digest([(paths[index], methods[index]) for index in missing]), strict=True
        ):
            found[index] = digest
            if settled:
                entry = fresh.setdefault(keys[index][0], {"status": status})
                entry[methods[index]] = digest
        self._remember(fresh)
        return [digest for digest in found if digest is not None]

    def _method(self, status: _Status) -> Hash:
        return "full" if self.kind == "full" or status[0] <= SMALL_BYTES else "sample"

    def _digest(self, work: Sequence[tuple[Path, Hash]]) -> list[tuple[str, _Status, bool]]:
        from concurrent.futures import ThreadPoolExecutor  # not needed when the plugin is only loaded

        stop = threading.Event()
        pool = ThreadPoolExecutor(_THREADS)  # network storage serves many reads at once
        try:
            return list(pool.map(lambda item: _digest_file(item[0], item[1], stop), work))
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)

    def _remembered(self) -> dict[str, Any]:
        """Return the memo's entries by path; none if the memo is missing or damaged."""
        if self.memo is None or os.name != "posix":  # on other systems ctime is the creation time
            return {}
        try:
            memo = json.loads(self.memo.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        return memo if isinstance(memo, dict) else {}

    def _remember(self, fresh: dict[str, dict[str, Any]]) -> None:
        if self.memo is None or not fresh:
            return
        # Another process may write its memo between our read and our rename: its files are then read again later.
        memo = self._remembered()
        for path, entry in fresh.items():
            old = memo.pop(path, None)
            same = isinstance(old, dict) and old.get("status") == entry["status"]
            memo[path] = {**old, **entry} if same else entry
        kept = dict(list(memo.items())[-_REMEMBERED:])
        with suppress(CacheError, ValueError):  # without a memo the files are only read again
            write_atomically(self.memo, json.dumps(kept).encode())


def _lookup(known: dict[str, Any], path: str, status: _Status, method: Hash) -> str | None:
    entry = known.get(path)
    if not isinstance(entry, dict) or entry.get("status") != status:
        return None
    digest = entry.get(method)
    return digest if isinstance(digest, str) and len(digest) == 64 else None


def _status(path: Path | int) -> _Status:
    try:
        known = os.stat(path)  # noqa: PTH116 - takes a path or an open file
    except OSError as error:
        raise ModelError(f"cannot read the model file {path}: {error.strerror or error}") from error
    return [known.st_size, known.st_mtime_ns, known.st_ctime_ns, known.st_ino, known.st_dev]


def _digest_file(path: Path, method: Hash, stop: threading.Event) -> tuple[str, _Status, bool]:
    """Return a file's digest, its status, and whether the status would show a later change."""
    for _ in range(_TRIES):
        began = time.time_ns()
        try:
            with path.open("rb", buffering=0) as file:
                before = _status(file.fileno())
                digest = _full(file.fileno(), stop) if method == "full" else _sampled(file.fileno(), before[0])
                after = _status(file.fileno())
        except OSError as error:
            raise ModelError(f"cannot read the model file {path}: {error.strerror or error}") from error
        if before == after == _status(path):
            return digest, after, max(after[1], after[2]) < began - _RACY_NS
    raise ModelError(f"the model file {path} changed while it was read: wait until it is complete, then run again")


def _full(file: int, stop: threading.Event) -> str:
    hashed = hashlib.sha256()
    while (chunk := os.read(file, _CHUNK_BYTES)) and not stop.is_set():
        hashed.update(chunk)
    return hashed.hexdigest()


def _sampled(file: int, size: int) -> str:
    """Return the digest of a file's size, its header, and samples of its tensors and of the whole file."""
    head = _head(file, size)
    hashed = hashlib.sha256(f"{size} {len(head)} ".encode() + head)
    step = (size - BLOCK_BYTES) / (BLOCKS - 1)
    blocks = [(round(index * step), BLOCK_BYTES) for index in range(BLOCKS)]
    for offset, length in sorted({*blocks, *_tensor_spans(head, size)}):
        hashed.update(f" {offset} {length} ".encode() + _read(file, offset, length))
    return hashed.hexdigest()


def _head(file: int, size: int) -> bytes:
    start = _read(file, 0, 9)
    is_safetensors = start[8:] == b"{"
    claimed = 8 + int.from_bytes(start[:8], "little")  # may be false
    return _read(file, 0, min(size, claimed, SAFETENSORS_HEADER_BYTES) if is_safetensors else OTHER_HEAD_BYTES)


def _tensor_spans(head: bytes, size: int) -> list[tuple[int, int]]:
    """Return offset and length of each tensor's sample; none if this is not a header, or a damaged one.

    Each tensor is sampled, because a single one may be all that changed: the scales of another calibration, one layer
    of a repaired checkpoint.
    """
    start = 8 + int.from_bytes(head[:8], "little")
    if start > len(head):
        return []
    try:
        header = json.loads(head[8:start])
        tensors = {
            str(name): (start + int(entry["data_offsets"][0]), start + int(entry["data_offsets"][1]))
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError):
        return []
    if len(tensors) > MOST_TENSORS:
        chosen = sorted(tensors, key=lambda name: hashlib.sha256(name.encode("utf-8", "replace")).digest())
        tensors = {name: tensors[name] for name in chosen[:MOST_TENSORS]}
    spans = []
    for begin, end in tensors.values():
        if start <= begin < end <= size:
            length = min(end - begin, TENSOR_BYTES)
            spans.append((begin + (end - begin - length) // 2, length))
    return spans


def _read(file: int, offset: int, length: int) -> bytes:
    """Return the bytes of a span; fewer only at the end of the file."""
    parts, left = [], length
    while left and (part := os.pread(file, left, offset + length - left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
