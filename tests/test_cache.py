"""The cache directory, on disks that are real: read-only, too small, not there."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from recorded import record

from pytest_kld.cache import Cache
from pytest_kld.errors import CacheError

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_kld.windows import Windows


def test_a_cache_directory_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"file/cache cannot be written: .*--kld-cache-dir"):
        Cache(tmp_path / "file" / "cache")


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 700 kB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", disk], check=False, capture_output=True)
    if mount.returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_read_only_disk_is_an_error(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(CacheError, match="Read-only file system"):
        Cache(small_disk)


def test_a_disk_that_fills_up_keeps_nothing_half_written(
    small_disk: Path, reference_dir: Path, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CacheError, match=r"needs 1\.\d MB and .* has 700\.\d kB free|needs .* and .* free"):
        record(reference_dir, windows, small_disk, store="logits")
    assert not list(small_disk.rglob("*.partial"))
    # The check sees a larger disk than there is, as when another process fills it meanwhile.
    monkeypatch.setattr(Cache, "require_free", lambda *_: 1 << 40)
    with pytest.raises(CacheError, match=r"cannot write .*00002\.safetensors: .*No space left.*--kld-cache-dir"):
        record(reference_dir, windows, small_disk, store="logits")
    (partial,) = small_disk.rglob("*.partial")
    assert sorted(path.name for path in partial.rglob("*.*")) == ["00000.safetensors", "00001.safetensors"]
