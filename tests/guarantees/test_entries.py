"""Damage to an entry of the cache, by disks, clocks, strangers and other sessions."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import TINY, Gate, MakeDisk, MakeModel
from guarantees.campaign import BLIND, REAL, SEEDS, Campaign
from recorded import record
from transformers import Qwen3MoeConfig

from pytest_kld.captures.capture import Capture
from pytest_kld.errors import CaptureError, DamagedCaptureError, DamagedScoresError
from pytest_kld.figures.compare import compare
from pytest_kld.figures.scores import Scores
from pytest_kld.progress import Silent

if TYPE_CHECKING:
    from pytest_kld.text.windows import Windows


@pytest.fixture(scope="module")
def whole(make_model: MakeModel, windows: Windows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The capture of a mixture of experts, which has every kind of file."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    model = make_model("guarantees-moe", Qwen3MoeConfig(**TINY, **experts))
    return record(model, windows, tmp_path_factory.mktemp("whole"), store="hidden").path


@pytest.fixture
def entry(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "entry"))


FILES = ["capture.json", "head.safetensors", "experts.safetensors", "windows/00001.safetensors"]


def flip(contents: bytes, chance: random.Random) -> bytes:
    changed = bytearray(contents)
    changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def truncate(contents: bytes, chance: random.Random) -> bytes:
    return contents[: chance.randrange(len(contents))]


def lengthen(contents: bytes, chance: random.Random) -> bytes:
    return contents + chance.randbytes(chance.randrange(1, 100))


CHANGES = [flip, truncate, lengthen]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_bit_flipped_or_bytes_lost_or_added_anywhere_in_a_capture_are_found(
    change: Callable[[bytes, random.Random], bytes], name: str, entry: Path, windows: Windows
) -> None:
    chance, contents = random.Random(name), (entry / name).read_bytes()
    for _ in range(10 * SEEDS):
        (entry / name).write_bytes(change(contents, chance))
        with pytest.raises(DamagedCaptureError):
            Capture.open(entry, windows).verify()
    (entry / name).write_bytes(contents)
    Capture.open(entry, windows).verify()


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_a_capture_emptied_deleted_or_swapped_with_any_other_is_found(
    name: str, entry: Path, windows: Windows
) -> None:
    contents = (entry / name).read_bytes()
    others = [path for path in entry.rglob("*") if path.is_file() and path != entry / name]
    assert len(others) == 5
    for other in others:
        (entry / name).write_bytes(other.read_bytes())
        with pytest.raises(DamagedCaptureError):
            Capture.open(entry, windows).verify()
    (entry / name).write_bytes(b"")
    with pytest.raises(DamagedCaptureError):
        Capture.open(entry, windows).verify()
    (entry / name).unlink()
    with pytest.raises(CaptureError):  # without a manifest it is no capture at all
        Capture.open(entry, windows).verify()
    (entry / name).write_bytes(contents)
    Capture.open(entry, windows).verify()


@pytest.mark.parametrize("change", CHANGES)
def test_a_bit_flipped_or_bytes_lost_or_added_anywhere_in_scores_are_found(
    change: Callable[[bytes, random.Random], bytes], entry: Path, windows: Windows, tmp_path: Path
) -> None:
    capture = Capture.open(entry, windows)
    scores = compare(
        capture, capture, windows, head="exact", device=torch.device("cpu"), progress=Silent(), extended=False
    )
    file = tmp_path / "scores.safetensors"
    scores.save(file)
    chance, contents = random.Random(1), file.read_bytes()
    for _ in range(50 * SEEDS):
        file.write_bytes(change(contents, chance))
        with pytest.raises(DamagedScoresError):
            Scores.load(file)


def test_sixty_four_readers_of_one_entry_read_the_same(whole: Path, windows: Windows) -> None:
    right = [Capture.open(whole, windows).rows(window, 0, 64) for window in range(3)]

    def read(number: int) -> bool:
        capture = Capture.open(whole, windows)
        capture.verify()
        return all(torch.equal(capture.rows(window, 0, 64), right[window]) for window in range(3))

    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(read, range(64))) == [True] * 64


EVICT = """
    import pytest, shutil
    from importlib import import_module
    from pathlib import Path
    from pytest_kld.captures.cache import Cache

    scoring = import_module("pytest_kld.measuring.scoring")

    @pytest.fixture(scope="session", autouse=True)
    def evict():
        compare, left = scoring.compare, [1]
        def run(*arguments, **named):
            if left:
                left.pop()
                cache = Cache(Path({cache!r}))
                for entry in cache.root.glob("captures/*"):
                    if entry.is_dir():
                        assert cache.remove(entry)
            return compare(*arguments, **named)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scoring, "compare", run)
            yield
"""
"""A conftest that removes all captures just before they are read, as another session might to keep the cache small."""


def test_captures_evicted_while_they_are_read_are_made_again(gate: Gate, tmp_path: Path) -> None:
    gate("--kld-json=report.json").assert_outcomes(passed=1)
    (right,) = gate.results()
    cache = tmp_path / "cache"
    gate.pytester.makeconftest(EVICT.format(cache=str(cache)))
    gate(f"--kld-cache-dir={cache}", "--kld-json=report.json").assert_outcomes(passed=1)
    (result,) = gate.results()
    assert result["figures"] == right["figures"]


CLOCK = """
    import itertools, time

    real, jumps = time.time, itertools.cycle([0, 10 * 86400, -10 * 86400])
    time.time = lambda: real() + next(jumps)
    time.time_ns = lambda: int(time.time() * 1e9)
"""


def test_a_clock_that_jumps_by_days_changes_no_figure_and_removes_nothing_in_use(
    gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate("--kld-json=report.json").assert_outcomes(passed=1)
    (right,) = gate.results()
    monkeypatch.setattr(time, "time", time.time)  # restores it
    monkeypatch.setattr(time, "time_ns", time.time_ns)
    gate.pytester.makeconftest(CLOCK)
    for options in ((), (), ("--kld-refresh",), ("--kld-cache-size=1kB",)):
        gate(f"--kld-cache-dir={tmp_path / 'cache'}", "--kld-json=report.json", *options).assert_outcomes(passed=1)
        (result,) = gate.results()
        assert result["figures"] == right["figures"]


def test_a_refresh_makes_an_entry_from_the_future_again(gate: Gate, tmp_path: Path) -> None:
    """Its clock was ahead when it was made, and was set back since."""
    options = (f"--kld-cache-dir={tmp_path / 'cache'}", "--kld-json=report.json")
    gate(*options).assert_outcomes(passed=1)
    made = [*tmp_path.glob("cache/captures/*/capture.json"), *tmp_path.glob("cache/scores/*.safetensors")]
    tomorrow = time.time() + 24 * 3600
    for path in made:
        os.utime(path, (tomorrow, tomorrow))
    gate(*options, "--kld-refresh").assert_outcomes(passed=1)
    assert len(made) == 3
    assert [path for path in made if path.stat().st_mtime > time.time() + 60] == []


@pytest.fixture
def disk(make_disk: MakeDisk) -> Path:
    """Less than a capture of the campaign takes."""
    return make_disk("550k")


@pytest.mark.slow
@pytest.mark.parametrize("campaign", ["transformers", "tiny", *REAL], indirect=True)
def test_a_disk_that_fills_up_in_a_capture_is_an_error_and_the_rerun_goes_on_when_there_is_room(
    disk: Path, campaign: Campaign, undisturbed: dict[str, Any]
) -> None:
    conftest = campaign.directory / "conftest.py"
    conftest.write_text(conftest.read_text() + BLIND)
    campaign.cache.symlink_to(disk)
    campaign.fault("")
    code, output = campaign.run()
    assert (code, campaign.result()["outcome"]) == (1, "error"), output
    assert "No space left on device" in output
    campaign.require_nobody()
    campaign.require_whole()
    assert campaign.windows() > 1
    subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
    campaign.completes(undisturbed[campaign.engine])


@pytest.mark.slow
@pytest.mark.parametrize("campaign", ["transformers"], indirect=True)  # a server's log keeps its disk writable
def test_a_cache_that_becomes_read_only_in_a_capture_is_an_error(
    disk: Path, campaign: Campaign, undisturbed: dict[str, Any]
) -> None:
    subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
    campaign.cache.symlink_to(disk)
    campaign.fault("slow")
    process = campaign.start()
    campaign.wait_for_windows(3, process)
    while subprocess.run(["mount", "-o", "remount,ro", disk], check=False).returncode:  # a file is being written
        time.sleep(0.01)
    output = campaign.output(process)
    assert (process.returncode, campaign.result()["outcome"]) == (1, "error"), output
    assert "Read-only file system" in output
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    campaign.completes(undisturbed[campaign.engine])
