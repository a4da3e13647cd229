"""Sweeping: removes what killed sessions left behind, once it is too old to be in use."""

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
"""Writing one file takes minutes, and a run in the spool ends if nothing has arrived for an hour."""
_TEMPORARIES = (".*.tmp", "scores/.*.tmp", "logs/.*.tmp", "captures/*.partial/.*.tmp", "captures/*.partial/*/.*.tmp")
_RUN = re.compile(r"[0-9a-f]{32}")
"""The name of a run, see hook/protocol.py. Anything else in the directory belongs to somebody else."""


def sweep(root: Path, spool: Path) -> None:
    """Remove temporary files, discarded entries and runs that nobody has touched for 24 hours. Never fails.

    Args:
        root: the cache directory.
        spool: the directory through which servers pass their files.

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
            with suppress(OSError):  # another session is removing it, or another user owns it
                path.unlink()


def _touched(path: Path) -> float:
    """Return when a file, or a directory or any file in it, was last written."""
    times = []
    for file in [path, *path.glob("*")]:
        with suppress(OSError):
            times.append(file.lstat().st_mtime)
    return max(times, default=time.time())
