"""The cache directory, on disks that are real: read-only, too small, not there."""

from __future__ import annotations

import os
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
from recorded import record

from pytest_kld.captures.cache import Cache
from pytest_kld.captures.manifest import MANIFEST
from pytest_kld.errors import CacheError

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Gate, MakeDisk

    from pytest_kld.text.windows import Windows

DAY = 24 * 3600


def age(directory: Path, days: float) -> None:
    """Let it seem that nobody has used the files for so long."""
    then = time.time() - days * DAY
    for path in directory.rglob("*"):
        os.utime(path, (then, then))


def test_a_cache_directory_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"file/cache cannot be written: .*--kld-cache-dir"):
        Cache(tmp_path / "file" / "cache")


@pytest.fixture
def small_disk(make_disk: MakeDisk) -> Path:
    return make_disk("700k")


def test_a_read_only_disk_is_an_error(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(CacheError, match="Read-only file system"):
        Cache(small_disk)


def test_a_disk_that_fills_up_keeps_nothing_half_written(
    small_disk: Path, reference_dir: Path, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CacheError, match=r"needs 1\.\d MB, but .* has 7\d\d\.\d kB free"):
        record(reference_dir, windows, small_disk, store="logits")
    assert not list(small_disk.rglob("*.partial"))
    # The check sees a larger disk than there is, as when another process fills it meanwhile.
    monkeypatch.setattr(Cache, "require_free", lambda *_: 1 << 40)
    with pytest.raises(CacheError, match=r"cannot write .*00002\.safetensors: .*No space left.*--kld-cache-dir"):
        record(reference_dir, windows, small_disk, store="logits")
    (partial,) = small_disk.rglob("*.partial")
    assert sorted(path.name for path in partial.rglob("*.*")) == ["00000.safetensors", "00001.safetensors"]


def test_a_cache_that_is_too_large_loses_what_was_used_least_recently(
    reference_dir: Path, windows: Windows, tmp_path: Path
) -> None:
    oldest, old, recent = (
        record(reference_dir, windows.first(count), tmp_path, dtype=dtype).path
        for count, dtype in ((3, "float32"), (2, "bfloat16"), (1, "float16"))
    )
    for entry, days in ((oldest, 4), (old, 3), (recent, 2)):
        age(entry, days)
    cache = Cache(tmp_path)
    size = {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in (old, recent)}
    assert cache.shrink(10**12)[0] == 0
    assert cache.shrink(sum(size.values())) == (1, sum(size.values()))
    assert (oldest.exists(), old.exists(), recent.exists()) == (False, True, True)
    cache.mark_used(old / MANIFEST)
    with cache.lock(recent, lambda: None):
        assert cache.shrink(0)[0] == 0  # one is in use, the other was used just now
    assert cache.shrink(0) == (1, size[old])
    assert (old.exists(), recent.exists()) == (True, False)


def test_a_session_keeps_the_cache_within_its_size_and_what_it_used(gate: Gate, tmp_path: Path) -> None:
    options = (f"--kld-cache-dir={tmp_path / 'cache'}", "--kld-max-mean=100", "--kld-cache-size=1kB")
    result = gate(*options)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        ["*the cache holds * kB, more than --kld-cache-size: its remaining entries are in use, or were used in*"]
    )
    gate(*options[:-1], "--kld-store=logits").assert_outcomes(passed=1)
    age(tmp_path / "cache", 2)
    result = gate(*options)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*removed 3 entries from the cache, which holds *B now"])
    assert len(list((tmp_path / "cache" / "captures").glob("*[!k]"))) == 2  # but for locks
