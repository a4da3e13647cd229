"""`pytest-kld cache` on a cache that a gate filled."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from filelock import FileLock

from pytest_kld.command import main

if TYPE_CHECKING:
    from conftest import Gate


@pytest.fixture
def cache(gate: Gate, tmp_path: Path) -> Path:
    """A cache with two captures and their scores."""
    made = tmp_path / "cache"
    gate.cache = f"--kld-cache-dir={made}"
    gate("--kld-max-mean=1").assert_outcomes(passed=1)
    return made


def listed(cache: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["cache", "ls", "--json", "--cache-dir", str(cache)]) == 0
    entries: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return entries


def flip_a_byte(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[-1] ^= 1
    path.write_bytes(contents)


def test_every_capture_and_every_scores_file_is_listed(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {path.name for path in cache.glob("captures/*") if path.is_dir()}
    names |= {path.stem for path in cache.glob("scores/*.safetensors")}
    entries = listed(cache, capsys)
    assert {entry["name"] for entry in entries} == names
    for entry in entries:
        assert entry["bytes"] > 0
        assert entry["windows"] == 3
        assert entry["damage"] == ""
        manifest = Path(entry["path"]) / "capture.json"
        if entry["kind"] == "capture":
            assert entry["model"] == json.loads(manifest.read_text())["model"]
            assert entry["engine"] == "transformers"
        assert entry["used"].startswith("20")
    assert main(["cache", "ls", "--cache-dir", str(cache)]) == 0
    assert f"{len(names)} entries" in capsys.readouterr().out


def test_a_cache_that_does_not_exist_is_empty_and_is_not_created(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", "ls", "--cache-dir", str(tmp_path / "none")]) == 0
    assert "holds no captures" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_path_prints_the_cache_directory(capsys: pytest.CaptureFixture[str]) -> None:
    from platformdirs import user_cache_path

    assert main(["cache", "path"]) == 0
    assert capsys.readouterr().out == f"{user_cache_path('pytest-kld')}\n"


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("captures/*/windows/00001.safetensors", "windows/00001.safetensors is corrupt"),
        ("scores/*.safetensors", "corrupt"),
    ],
)
def test_verify_names_the_damaged_file(
    cache: Path, pattern: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", "verify", "--cache-dir", str(cache)]) == 0
    flip_a_byte(damaged := next(cache.glob(pattern)))
    capsys.readouterr()
    assert main(["cache", "verify", "--json", "--cache-dir", str(cache)]) == 1
    results = json.loads(capsys.readouterr().out)
    (wrong,) = [result for result in results if result["damage"]]
    assert said in wrong["damage"]
    assert str(damaged) in wrong["damage"]
    assert damaged.is_relative_to(wrong["path"])


def test_what_is_damaged_is_listed_with_its_damage(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = {path.parent.name: path for path in cache.glob("captures/*/capture.json")}
    damaged |= {path.stem: path for path in cache.glob("scores/*.safetensors")}
    for path in damaged.values():
        path.write_bytes(b"no manifest, and no tensors")
    entries = listed(cache, capsys)
    assert {entry["name"] for entry in entries} == damaged.keys()
    for entry in entries:
        assert str(damaged[entry["name"]]) in entry["damage"]
        assert entry["bytes"] > 0


def test_what_was_set_aside_is_listed_as_such(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cache / "quarantine" / "some").mkdir(parents=True)
    (cache / "quarantine" / "some" / "file").write_text("x")
    assert [entry["name"] for entry in listed(cache, capsys) if entry["kind"] == "quarantine"] == ["some"]


def test_verify_finds_entries_under_a_wrong_name(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = next(cache.glob("scores/*.safetensors"))
    scores.rename(scores.with_stem("0" * 32))
    capture = next(path for path in cache.glob("captures/*") if path.is_dir())
    capture.rename(capture.with_name("1" * 32))
    assert main(["cache", "verify", "00000", "11111", "--cache-dir", str(cache)]) == 1
    out = capsys.readouterr().out
    assert "contains other scores than its name says" in out
    assert "a key that does not fit its directory's name" in out


def test_an_entry_that_does_not_exist_is_an_error(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "verify", "xyz", "--cache-dir", str(cache)]) == 2
    assert "there is no entry 'xyz'" in capsys.readouterr().err


def test_prune_removes_what_is_named_and_only_that(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {entry["name"]: entry for entry in listed(cache, capsys)}
    name = next(name for name, entry in before.items() if entry["kind"] == "capture")
    assert main(["cache", "prune", name[:10], "--dry-run", "--cache-dir", str(cache)]) == 0
    assert f"would remove capture {name}" in capsys.readouterr().out
    assert len(listed(cache, capsys)) == len(before)
    assert main(["cache", "prune", name[:10], "--cache-dir", str(cache)]) == 0
    assert {entry["name"] for entry in listed(cache, capsys)} == before.keys() - {name}


def test_prune_to_a_size_removes_the_least_recently_used_and_spares_the_last_24_hours(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [entry for entry in listed(cache, capsys) if entry["kind"] == "capture"]
    old = Path(entries[0]["path"])
    for file in [old, *old.rglob("*")]:
        os.utime(file, (time.time() - 100_000,) * 2)
    assert main(["cache", "prune", "--to", "1kB", "--cache-dir", str(cache)]) == 0
    assert not old.exists()
    assert Path(entries[1]["path"]).exists()


def test_prune_of_partial_captures_keeps_the_complete_one_of_that_name(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capture = next(path for path in cache.glob("captures/*") if path.is_dir())
    shutil.copytree(capture, capture.with_name(f"{capture.name}.partial"))
    assert main(["cache", "prune", "--partial", "--cache-dir", str(cache)]) == 0
    assert capture.is_dir()
    assert not list(cache.glob("captures/*.partial"))


def test_prune_leaves_an_entry_that_a_session_is_making(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capture = next(path for path in cache.glob("captures/*") if path.is_dir())
    with FileLock(capture.with_name(f"{capture.name}.lock")):
        assert main(["cache", "prune", capture.name, "--cache-dir", str(cache)]) == 2
    assert capture.is_dir()
    assert "a session is making these entries" in capsys.readouterr().err


def test_prune_without_a_choice_is_a_usage_error(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "prune", "--cache-dir", str(cache)]) == 2
    assert "say what to remove" in capsys.readouterr().err


def test_an_exported_capture_is_the_same_after_its_import(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [entry["name"] for entry in listed(cache, capsys) if entry["kind"] == "capture"]
    archive, other = str(tmp_path / "captures.kld"), tmp_path / "other"
    assert main(["cache", "export", archive, *names, "--cache-dir", str(cache)]) == 0
    assert main(["cache", "import", archive, "--check", "--cache-dir", str(other)]) == 0
    assert not other.exists()
    capsys.readouterr()
    assert main(["cache", "import", archive, "--json", "--cache-dir", str(other)]) == 0
    imported = json.loads(capsys.readouterr().out)
    assert sorted(each["name"] for each in imported) == sorted(names)
    for name in names:
        for path in (cache / "captures" / name).rglob("*.safetensors"):
            assert path.read_bytes() == (other / path.relative_to(cache)).read_bytes()
    assert main(["cache", "verify", "--cache-dir", str(other)]) == 0
    capsys.readouterr()
    assert main(["cache", "import", archive, "--cache-dir", str(other)]) == 0
    assert capsys.readouterr().out.count("was there") == len(names)


def test_a_damaged_archive_is_not_imported(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = next(path.name for path in cache.glob("captures/*") if path.is_dir())
    archive = tmp_path / "captures.kld"
    assert main(["cache", "export", str(archive), name, "--cache-dir", str(cache)]) == 0
    contents = bytearray(archive.read_bytes())
    contents[len(contents) // 2] ^= 1
    archive.write_bytes(contents)
    assert main(["cache", "import", str(archive), "--cache-dir", str(tmp_path / "other")]) == 2
    assert "is damaged" in capsys.readouterr().err
    assert not list((tmp_path / "other").glob("captures/*"))
