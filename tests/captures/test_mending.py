"""A cache that mends itself: whatever is done to an entry, the next session has the right figures and says so."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from pytest_kld.captures.capture import Capture
from pytest_kld.captures.manifest import write_manifest
from pytest_kld.captures.quarantine import Quarantine

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import Gate

WINDOW = "windows/00001.safetensors"


class Cache:
    """A copy of a real cache that holds the reference, the candidate, a broken candidate, and both pairs' scores."""

    def __init__(self, gate: Gate, root: Path) -> None:
        self.gate, self.root = gate, root

    def run(self, *options: str, **named: Any) -> pytest.RunResult:
        return self.gate(f"--kld-cache-dir={self.root}", "--kld-json=report.json", *options, **named)

    @property
    def mean(self) -> float:
        (result,) = self.gate.results()
        return float(result["figures"]["mean"])

    def capture(self, model: Path) -> Path:
        """The entry of a model's capture."""
        (entry,) = [
            path.parent
            for path in self.root.glob("captures/*/capture.json")
            if json.loads(path.read_text())["model"] == str(model)
        ]
        return entry

    def scores(self) -> list[Path]:
        return sorted(self.root.glob("scores/*.safetensors"), key=lambda path: path.stat().st_mtime)

    def forget_scores(self) -> None:
        for path in self.scores():
            path.unlink()

    @property
    def quarantined(self) -> list[Path]:
        return sorted(self.root.glob("quarantine/*"))


@pytest.fixture
def cache(gate: Gate, broken_dir: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    made = tmp_path_factory.getbasetemp() / "mending-cache"
    if not made.is_dir():
        first = Cache(gate, made)
        first.run().assert_outcomes(passed=1)
        time.sleep(0.01)  # the scores are told apart by their times
        first.run("--kld-max-mean=100", candidates=(broken_dir,)).assert_outcomes(passed=1)
    shutil.copytree(made, tmp_path / "cache")
    return Cache(gate, tmp_path / "cache")


@pytest.fixture
def mean(cache: Cache) -> float:
    """The right figure."""
    cache.run().assert_outcomes(passed=1)
    return cache.mean


def flip(file: Path) -> None:
    contents = bytearray(file.read_bytes())
    contents[-5] ^= 64
    file.write_bytes(contents)


def swap(file: Path) -> None:
    other, between = file.with_name("00002.safetensors"), file.with_name("between")
    file.rename(between)
    other.rename(file)
    between.rename(other)


def into_another_schema(file: Path) -> None:
    write_manifest(file.parent, {**Capture.open(file.parent).manifest, "schema": 99})


def into_a_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "flipped": flip,
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "emptied": lambda file: file.write_bytes(b""),
    "garbage": lambda file: file.write_bytes(os.urandom(file.stat().st_size)),
    "removed": lambda file: file.unlink(),
    "directory": into_a_directory,
}
OF_CAPTURES = [
    *((damage, name) for name in (WINDOW, "head.safetensors", "capture.json") for damage in DAMAGES),
    ("swapped", WINDOW),
    ("schema", "capture.json"),
]


@pytest.mark.parametrize(("damage", "name"), OF_CAPTURES)
def test_a_damaged_capture_is_set_aside_and_captured_anew(damage: str, name: str, cache: Cache, mean: float) -> None:
    entry = cache.capture(cache.gate.reference)
    cache.forget_scores()
    {**DAMAGES, "swapped": swap, "schema": into_another_schema}[damage](entry / name)
    result = cache.run()
    result.assert_outcomes(passed=1, warnings=1)
    assert cache.mean == mean
    (aside,) = cache.quarantined
    assert aside.name.startswith(f"{entry.name}-")
    (line,) = [line for line in result.outlines if line.startswith("kld: the cache entry")]
    assert line.startswith(f"kld: the cache entry {entry} was damaged, was moved to {aside} and is made again if ")
    assert str(entry / name) in line or (str(entry) in line and name == "capture.json")
    cache.run().assert_outcomes(passed=1)  # and once is enough
    assert cache.mean == mean
    assert cache.quarantined == [aside]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_scores_are_set_aside_and_computed_anew(damage: str, cache: Cache, mean: float) -> None:
    file = cache.scores()[0]
    DAMAGES[damage](file)
    result = cache.run()
    result.assert_outcomes(passed=1, warnings=0 if damage == "removed" else 1)
    assert cache.mean == mean
    assert len(cache.quarantined) == (0 if damage == "removed" else 1)
    assert file.is_file()
    if damage != "removed":
        result.stdout.fnmatch_lines([f"kld: the cache entry {file} was damaged, * the scores file {file} is corrupt*"])


def test_another_captures_directory_under_an_entrys_name_is_not_believed(cache: Cache, mean: float) -> None:
    reference, candidate = cache.capture(cache.gate.reference), cache.capture(cache.gate.candidate)
    cache.forget_scores()
    shutil.rmtree(reference)
    shutil.copytree(candidate, reference)
    result = cache.run()
    result.assert_outcomes(passed=1, warnings=1)
    result.stdout.fnmatch_lines(["kld: the cache entry *capture.json has a key that does not fit *another capture."])
    assert cache.mean == mean > 0


def test_another_pairs_scores_under_an_entrys_name_are_not_believed(
    cache: Cache, mean: float, broken_dir: Path
) -> None:
    ours, theirs = cache.scores()
    shutil.copyfile(theirs, ours)
    result = cache.run()
    result.assert_outcomes(passed=1, warnings=1)
    result.stdout.fnmatch_lines([f"kld: the cache entry *{ours} contains other scores than its name says"])
    assert cache.mean == mean
    cache.run("--kld-max-mean=100", candidates=(broken_dir,)).assert_outcomes(passed=1)
    assert cache.mean > 10 * mean


def test_a_reference_that_turns_out_to_be_damaged_before_a_candidate_is_run_is_mended(
    cache: Cache, mean: float
) -> None:
    shutil.rmtree(cache.capture(cache.gate.candidate))
    entry = cache.capture(cache.gate.reference)
    flip(entry / WINDOW)
    result = cache.run()
    result.assert_outcomes(passed=1, warnings=1)
    reference, candidate = (f"kld: capture {path}: 3/3*" for path in (cache.gate.reference, cache.gate.candidate))
    result.stdout.fnmatch_lines([reference, candidate])  # in this order: nothing is run in vain
    assert cache.mean == mean


def test_a_strict_cache_reports_damage_as_an_error_that_a_refresh_mends(cache: Cache, mean: float) -> None:
    window = cache.capture(cache.gate.reference) / WINDOW
    (cache.gate.path / "pytest.ini").write_text("[pytest]\nkld_strict_cache = true\n")
    cache.forget_scores()
    flip(window)
    for _ in range(2):
        result = cache.run()
        result.assert_outcomes(errors=1)
        result.stdout.fnmatch_lines([f"*CaptureError: {window} is corrupt*pass --kld-refresh*"])
    assert not cache.quarantined
    cache.run("--kld-refresh").assert_outcomes(passed=1)
    assert cache.mean == mean
    flip(cache.scores()[0])
    result = cache.run("--kld-strict-cache")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*ScoresError: the scores file * is corrupt*delete it or pass --kld-refresh*"])
    cache.run("--kld-refresh").assert_outcomes(passed=1)
    assert cache.mean == mean


def test_a_damaged_capture_that_was_named_by_its_path_is_an_error(cache: Cache, tmp_path: Path) -> None:
    named = tmp_path / "named"
    shutil.copytree(cache.capture(cache.gate.reference), named)
    options = (f"--kld-ref={named}", f"--kld-tokenizer={cache.gate.reference}")
    cache.run(*options).assert_outcomes(passed=1)
    cache.forget_scores()
    flip(named / WINDOW)
    result = cache.run(*options)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        [f"*CaptureError: {named / WINDOW} is corrupt*you named it by its path, record or copy*"]
    )
    assert not cache.quarantined
    assert named.is_dir()


@pytest.mark.slow
def test_two_processes_that_want_one_damaged_entry_mend_it_once(cache: Cache, mean: float) -> None:
    cache.forget_scores()
    flip(cache.capture(cache.gate.reference) / WINDOW)
    command = [
        *(sys.executable, "-m", "pytest", f"--kld-cache-dir={cache.root}", f"--kld-ref={cache.gate.reference}"),
        *(f"--kld-candidate={cache.gate.candidate}", *cache.gate.protocol, "--kld-max-mean=0.1"),
    ]
    both = [
        subprocess.Popen([*command, f"--kld-json={name}.json"], cwd=cache.gate.path, stdout=subprocess.PIPE, text=True)
        for name in ("one", "two")
    ]
    output = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], output
    assert [cache.gate.results(f"{name}.json")[0]["figures"]["mean"] for name in ("one", "two")] == [mean, mean]
    assert len(cache.quarantined) == 1
    assert sum("was damaged" in text for text in output) == 1


@pytest.mark.slow
def test_xdist_workers_that_want_one_damaged_entry_mend_it_once(cache: Cache, broken_dir: Path, mean: float) -> None:
    cache.forget_scores()
    flip(cache.capture(cache.gate.reference) / WINDOW)
    result = cache.run("-n2", "--kld-max-mean=100", candidates=(cache.gate.candidate, broken_dir))
    result.assert_outcomes(passed=2, warnings=1)
    result.stdout.fnmatch_lines(["*CacheWarning: the cache entry * was damaged, was moved to *"])
    assert len(cache.quarantined) == 1
    means = {row["candidate"]: row["figures"]["mean"] for row in cache.gate.results()}
    assert means[str(cache.gate.candidate)] == mean


@pytest.mark.slow
def test_a_damaged_capture_of_a_later_round_gives_way_to_the_first_round(
    pytester: pytest.Pytester, reference_dir: Path, candidate_dir: Path
) -> None:
    options = [
        *(f"--kld-ref={reference_dir}", f"--kld-candidate={candidate_dir}", "--kld-cache-dir=cache"),
        *("--kld-dataset=python-docs", "--kld-window-size=64", "--kld-stride=64", "--kld-json=report.json"),
    ]

    def run(*more: str, outcome: str = "passed") -> dict[str, Any]:
        pytester.runpytest(*options, *more).assert_outcomes(**{outcome: 1}, warnings=len(damaged))
        (row,) = json.loads((pytester.path / "report.json").read_text())["results"]
        return dict(row)

    damaged: list[Path] = []
    first = run("--kld-windows=auto:16", "--kld-max-max=1000")
    run("--kld-windows=16", "--kld-max-max=1000")
    for path in pytester.path.glob("cache/captures/*/windows/00015.safetensors"):
        damaged.append(path)
        path.write_bytes(b"")
    for path in pytester.path.glob("cache/scores/*.safetensors"):
        path.unlink()
    assert len(damaged) == 2
    again = run("--kld-windows=auto:16", "--kld-max-max=1000")
    assert again["figures"] == first["figures"]
    assert again["figures"]["positions"] < 16 * 64


COUNT_READS = """
    import os
    import pytest
    from pytest_kld.captures import capture

    @pytest.fixture(scope="session", autouse=True)
    def count_reads():
        read = capture.sha256_of_file
        def count(path):
            with open(os.environ["READS"], "a") as file:
                file.write(f"{path}\\n")
            return read(path)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(capture, "sha256_of_file", count)
            yield
"""


def test_a_session_reads_a_captures_contents_once_to_verify_them(
    cache: Cache, broken_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("READS", str(tmp_path / "reads"))
    cache.gate.pytester.makeconftest(COUNT_READS)
    both = (cache.gate.candidate, broken_dir)
    cache.run("--kld-max-mean=100", candidates=both).assert_outcomes(passed=2)
    assert not (tmp_path / "reads").exists()  # the scores say it all
    cache.forget_scores()
    cache.run("--kld-max-mean=100", candidates=both).assert_outcomes(passed=2)
    reads = (tmp_path / "reads").read_text().split()
    assert len(reads) == len(set(reads)) == 3 * 4


def test_a_file_that_changes_while_it_is_compared_is_found(cache: Cache, mean: float) -> None:
    cache.forget_scores()
    window = cache.capture(cache.gate.reference) / WINDOW
    cache.gate.pytester.makeconftest(f"""
        import pytest
        from pathlib import Path
        from importlib import import_module

        scoring = import_module("pytest_kld.measuring.scoring")

        @pytest.fixture(scope="session", autouse=True)
        def damage():
            compare, left = scoring.compare, [1]
            def run(*arguments, **named):
                if left:
                    left.pop()
                    file = Path({str(window)!r})
                    contents = bytearray(file.read_bytes())
                    contents[-5] ^= 64
                    file.write_bytes(contents)
                return compare(*arguments, **named)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(scoring, "compare", run)
                yield
    """)
    cache.run().assert_outcomes(passed=1, warnings=1)
    assert cache.mean == mean
    assert len(cache.quarantined) == 1


def test_the_quarantine_is_bounded_and_loses_the_oldest_first(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "quarantine")
    for index in range(12):
        (tmp_path / "entry").mkdir()
        (tmp_path / "entry" / str(index)).write_bytes(b"x" * 100)
        taken = quarantine.take(tmp_path / "entry")
        assert taken is not None
        os.utime(taken, (index, index))
    names = {path.name for path in quarantine.directory.glob("*/*")}
    assert names == {str(index) for index in range(4, 12)}
    assert quarantine.shrink(250) == 200
    assert {path.name for path in quarantine.directory.glob("*/*")} == {"10", "11"}
    assert quarantine.shrink(0) == 0
    assert not list(quarantine.directory.iterdir())
    assert quarantine.take(tmp_path / "gone") is None
