"""What killed sessions left is swept when it is old, and nothing else."""

from __future__ import annotations

import os
import shutil
import time
from typing import TYPE_CHECKING

from pytest_kld.captures.sweep import _touched
from pytest_kld.hook.protocol import new_run

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Gate


def age(*paths: Path) -> None:
    then = time.time() - 25 * 3600
    for path in paths:
        for file in [*path.rglob("*"), path]:
            os.utime(file, (then, then))


def test_a_session_sweeps_what_is_old_and_nobodys(gate: Gate, tmp_path: Path) -> None:
    cache, spool = tmp_path / "cache", tmp_path / "spool"
    options = (f"--kld-cache-dir={cache}", f"--kld-capture-dir={spool}")
    gate(*options).assert_outcomes(passed=1)
    (entry, other) = (path.parent for path in cache.glob("captures/*/capture.json"))
    shutil.move(other, f"{other}.partial")
    temporary = [
        *(cache / f".{new_run()}.tmp", cache / "scores" / ".a.safetensors.0123.tmp"),
        cache / "captures" / f"{other.name}.partial" / "windows" / ".00007.safetensors.0123.tmp",
    ]
    for path in temporary:
        path.write_bytes(b"half of it")
    gone, live, old_of_others = (spool / new_run() for _ in range(2)), spool / new_run(), spool / "notes"
    dead, discarded = [*gone], cache / "discarded" / "entry-0123"
    for directory in (*dead, live, old_of_others, discarded):
        directory.mkdir(parents=True)
        (directory / "0.0.safetensors").write_bytes(b"rows")
    fresh = cache / "scores" / ".b.safetensors.0123.tmp"
    fresh.write_bytes(b"being written")
    age(cache, *dead, live, old_of_others)
    os.utime(live / "0.0.safetensors")
    os.utime(fresh)
    gate(*options).assert_outcomes(passed=1)
    assert not [path for path in (*temporary, *dead, discarded) if path.exists()]
    assert [path for path in (live, old_of_others, fresh, entry / "capture.json") if not path.exists()] == []


def test_what_vanishes_meanwhile_is_not_old(tmp_path: Path) -> None:
    """Another session removed it between the listing and the look."""
    assert _touched(tmp_path / "gone") >= time.time() - 60
