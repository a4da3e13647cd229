"""The identity of a local model: the contents of every file that an engine may read, wherever the model is."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_kld.errors import ModelError
from pytest_kld.files import sha256_of_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_kld.subjects.digests import FileDigests

INDEX_SUFFIX = ".index.json"
"""The suffix of files that list which shard contains which tensor."""
_NOT_READ = {".md", ".gif", ".jpeg", ".jpg", ".pdf", ".png", ".svg", ".webp"}
"""Suffixes of a model's documentation, which no engine reads."""
_MOST_ENTRIES = 100_000
"""With more files and folders than this, a directory is not a model; it may contain a link to a whole disk."""
_MOST_INDEX_BYTES = 1 << 30


def digest_of_directory(root: Path, digests: FileDigests) -> str:
    """Return the SHA-256 of the names and contents of a model's files, in hexadecimal. A copy elsewhere has the same.

    Raises:
        ModelError: a link is broken, or a file cannot be read.

    """
    files = model_files(root)
    return sha256_of_json(list(zip(files, digests.of(list(files.values())), strict=True)))


def model_files(root: Path) -> dict[str, Path]:
    """Return the files that an engine may read, by the names under which it finds them.

    These are all files in the directory and in linked folders, except hidden files and documentation; and all shards
    that an index names, regardless of their location.

    Raises:
        ModelError: a link is broken, a folder cannot be read, or there are too many files for a model.

    """
    files = dict(sorted(_walk(root)))
    named = {
        os.path.join(os.path.dirname(name), shard): path.parent / shard  # noqa: PTH118, PTH120 - names, not paths
        for name, path in files.items()
        if name.endswith(INDEX_SUFFIX)
        for shard in _shards(path)
    }
    for name, path in sorted(named.items()):
        if name not in files and _is_regular_file(path):
            files[name] = path
    return files


def _walk(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield name and path of the files in a directory. Links are followed, except those that form a cycle."""
    entries = 0
    pending = [(root, "", frozenset({_inode(root)}))]
    while pending:
        folder, prefix, above = pending.pop()
        try:
            paths = sorted(folder.iterdir())
        except OSError as error:
            raise ModelError(f"cannot read the folder {folder}: {error.strerror or error}") from error
        if (entries := entries + len(paths)) > _MOST_ENTRIES:
            raise ModelError(
                f"{root} contains more than {_MOST_ENTRIES:,} files and folders, too many for a model. Check it for a "
                "link to a large folder."
            )
        for path in paths:
            name = path.name
            if name.startswith(".") or name == "__pycache__":
                continue
            if path.suffix.lower() in _NOT_READ and not path.is_dir():
                continue
            mode = _status(path).st_mode
            if stat.S_ISREG(mode):
                yield prefix + name, path
            elif stat.S_ISDIR(mode) and (inode := _inode(path)) not in above:
                pending.append((path, f"{prefix}{name}/", above | {inode}))


def _status(path: Path) -> os.stat_result:
    """Return the status of a path's target.

    Raises:
        ModelError: the target cannot be read; if the path is a link, the message names its target.

    """
    try:
        return path.stat()
    except OSError as error:
        if path.is_symlink():
            raise ModelError(
                f"{path} is a link to {path.readlink()}, which cannot be read: {error.strerror or error}. Complete "
                "the model, or remove the link."
            ) from error
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error


def _inode(path: Path) -> tuple[int, int]:
    known = _status(path)
    return known.st_dev, known.st_ino


def _is_regular_file(path: Path) -> bool:
    """Tell whether a shard exists. A missing one may belong to an unused index."""
    try:
        return path.is_file() or (path.is_symlink() and stat.S_ISREG(_status(path).st_mode))
    except (OSError, ValueError):  # not a valid file name
        return False


def _shards(index: Path) -> set[str]:
    """Return the files that an index names; none if it cannot be parsed, which the loader will report."""
    if index.stat().st_size > _MOST_INDEX_BYTES:
        raise ModelError(f"{index} is too large for an index of shards: {index.stat().st_size / 1e9:.1f} GB")
    try:
        names = json.loads(index.read_bytes())["weight_map"].values()
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return set()
    return {name for name in names if isinstance(name, str) and name}
