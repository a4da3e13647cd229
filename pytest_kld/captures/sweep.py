"""Sweeping: what killed sessions left behind is removed, once it is so old that nobody can be at work on it."""

from __future__ import annotations

import re
import shutil
import time
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_SECONDS = 24 * 3600
"""Writing one file takes minutes, and a run in the spool ends when nothing has come for an hour."""
_TEMPORARIES = (".*.tmp", "scores/.*.tmp", "logs/.*.tmp", "captures/*.partial/.*.tmp", "captures/*.partial/*/.*.tmp")
_RUN = re.compile(r"[0-9a-f]{32}")
"""The name of a run, see hook/protocol.py. Whatever else is in the directory is somebody else's."""


def sweep(root: Path, spool: Path) -> None:
    """Remove temporary files, discarded entries and runs that nobody has touched for 24 hours. Never fails.

    Args:
        root: the cache directory.
        spool: the directory that passes on what servers write.

    """
    before = time.time() - _SECONDS
    for pattern in _TEMPORARIES:
        _remove(root.glob(pattern), before)
    _remove(root.glob("discarded/*"), before)
    _remove((path for path in spool.glob("*") if _RUN.fullmatch(path.name)), before)


def _remove(paths: Iterable[Path], before: float) -> None:
    for path in paths:
        if _touched(path) >= before:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):  # another session removes it at the same time, or it is somebody else's
                path.unlink()


def _touched(path: Path) -> float:
    """Return when a file, or a directory or one of its files, was written last."""
    times = []
    for file in [path, *path.glob("*")]:
        with suppress(OSError):
            times.append(file.lstat().st_mtime)
    return max(times, default=time.time())
