"""Rounds: the schedule, the error of all looks together, and that captures grow instead of starting again."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import coverage
from pytest_kld.captures.capture import Capture
from pytest_kld.captures.journal import Journal
from pytest_kld.captures.recording import adopt_windows
from pytest_kld.figures.schedule import MOST_ROUNDS, schedule

ROUNDS = ("--kld-dataset=python-docs", "--kld-windows=auto:16", "--kld-window-size=256", "--kld-stride=256")


@pytest.mark.parametrize("most", [1, 2, 3, 7, 16, 100, 101, 4096])
def test_schedule_doubles_up_to_the_most_and_spends_the_error_once(most: int) -> None:
    looks = schedule(most)
    counts = [look.windows for look in looks]
    assert counts[-1] == most
    assert len(counts) <= MOST_ROUNDS
    assert all(2 * less - 1 <= more <= 2 * less for less, more in itertools.pairwise(counts))
    assert sum(look.spend for look in looks) == pytest.approx(1)
    assert all(look.spend > 0 for look in looks)


def test_looking_after_every_round_decides_wrongly_no_more_often_than_promised() -> None:
    """If the true value equals the limit, every decision is wrong. 120 texts; benchmarks/coverage.py uses thousands."""
    texts = 120
    ours = coverage.stopping(texts, 100, 1.0, seed=2)
    assert ours["pass"] + ours["fail"] <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / texts)
    assert ours["windows"] > 90


def test_clear_cases_are_decided_early_and_rightly() -> None:
    assert coverage.stopping(20, 100, 0.3, seed=3)["pass"] == 1
    broken = coverage.stopping(20, 100, 3.0, seed=4)
    assert broken["fail"] == 1
    assert broken["windows"] < 30


class Session:
    """A directory with its own cache, in which the gate is run."""

    def __init__(self, pytester: pytest.Pytester, reference: Path, candidate: Path) -> None:
        self.pytester = pytester
        self.models = (f"--kld-ref={reference}", f"--kld-candidate={candidate}", "--kld-cache-dir=cache")

    def run(self, *options: str) -> tuple[pytest.RunResult, dict[str, Any]]:
        result = self.pytester.runpytest(*self.models, "--kld-json=report.json", *options)
        (gated,) = json.loads((self.pytester.path / "report.json").read_text())["results"]
        return result, gated

    def captures(self) -> dict[int, Path]:
        """Return captures in the cache by their number of windows; if both sides have one, either of them."""
        manifests = (self.pytester.path / "cache" / "captures").glob("*/capture.json")
        return {len(json.loads(path.read_text())["window_files"]): path.parent for path in manifests}


@pytest.fixture
def session(pytester: pytest.Pytester, reference_dir: Path, candidate_dir: Path) -> Session:
    return Session(pytester, reference_dir, candidate_dir)


def test_a_clear_candidate_is_decided_in_the_first_round_that_has_enough_windows(session: Session) -> None:
    """1, 2 and 4 windows have 256 to 1,024 positions; 919, 809 and 672 independent ones are needed. 8 need 534."""
    result, gated = session.run(*ROUNDS, "--kld-max-mean=5")
    result.assert_outcomes(passed=1)
    assert gated["about"]["protocol"]["windows"] == 8
    result.stdout.fnmatch_lines(
        ["*, 1 windows: inconclusive", "*, 2 windows: inconclusive", "*, 4 windows: inconclusive", "*, 8 windows: pass"]
    )
    assert [check["state"] for check in gated["checks"]] == ["pass"] * 4
    assert gated["intervals"]["mean"]["confidence"] == 0.95
    assert set(session.captures()) == {1, 2, 4, 8}


@pytest.mark.slow
def test_an_undecided_one_goes_on_to_the_most_windows_and_reuses_window_files(session: Session) -> None:
    _, measured = session.run(*ROUNDS[:1], "--kld-windows=16", *ROUNDS[2:])
    mean = measured["figures"]["mean"]
    session.pytester.path.joinpath("cache").rename(session.pytester.path / "elsewhere")
    result, gated = session.run(*ROUNDS, f"--kld-max-mean={mean:.12f}")
    assert gated["about"]["protocol"]["windows"] == 16
    assert gated["figures"]["mean"] == pytest.approx(mean, rel=1e-6)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*1 of 4 KLD limits inconclusive at confidence 0.95:*", "*? *mean KLD*[[]*]*"])
    captures = session.captures()
    assert set(captures) == {1, 2, 4, 8, 16}
    # All five captures of a model share one file on disk for the first window.
    assert all((path / "windows" / "00000.safetensors").stat().st_nlink == 5 for path in captures.values())
    result.stdout.fnmatch_lines(["*8 of 16 windows are already captured*"])


def test_what_a_run_of_all_windows_left_is_used_and_not_made_again(session: Session) -> None:
    session.run(*ROUNDS[:1], "--kld-windows=16", *ROUNDS[2:])
    result, gated = session.run(*ROUNDS, "--kld-max-mean=5")
    assert gated["about"]["protocol"]["windows"] == 8
    assert set(session.captures()) == {16}
    result.stdout.no_fnmatch_line("*loading*")


def test_each_test_goes_as_far_as_its_own_limits_need(session: Session) -> None:
    _, measured = session.run(*ROUNDS[:1], "--kld-windows=16", *ROUNDS[2:])
    mean = measured["figures"]["mean"]
    session.pytester.makepyfile(
        f"""
        import pytest

        @pytest.mark.kld(max_mean=5)
        def test_loose(kld):
            assert kld.scores.columns["kl"].shape[0] == 8

        @pytest.mark.kld(max_mean={mean!r})
        def test_close(kld):
            assert kld.scores.columns["kl"].shape[0] == 16
            assert kld.intervals["mean"].low < kld.mean < kld.intervals["mean"].high
        """
    )
    result = session.pytester.runpytest(*session.models, *ROUNDS, "--kld-inconclusive=pass")
    result.assert_outcomes(passed=2)


def test_a_window_file_that_rotted_is_not_taken_over(session: Session, tmp_path: Path) -> None:
    session.run(*ROUNDS[:1], "--kld-windows=2", *ROUNDS[2:])
    capture = Capture.open(session.captures()[2])
    rotten = capture.path / "windows" / "00001.safetensors"
    contents = bytearray(rotten.read_bytes())
    contents[-1] ^= 1
    rotten.write_bytes(contents)
    journal = Journal(tmp_path / "partial", {"a": 1})
    adopt_windows(capture, journal)
    assert journal.names == ["windows/00000.safetensors"]
    assert [path.name for path in (tmp_path / "partial" / "windows").iterdir()] == ["00000.safetensors"]


def test_a_captured_reference_directory_is_used_for_every_round(session: Session, reference_dir: Path) -> None:
    session.run(*ROUNDS[:1], "--kld-windows=16", *ROUNDS[2:])
    captures = (session.pytester.path / "cache" / "captures").glob("*/capture.json")
    (reference,) = [path.parent for path in captures if json.loads(path.read_text())["model"] == str(reference_dir)]
    result = session.pytester.runpytest(
        f"--kld-ref={reference}", f"--kld-tokenizer={reference_dir}", *session.models[1:], *ROUNDS, "--kld-max-mean=5"
    )
    result.assert_outcomes(passed=1)
