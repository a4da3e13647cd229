"""Windows from the start of a text or from all of it: rounds, reports, and a project's own windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Gate
from made import made_result

from pytest_kld.captures.capture import Capture
from pytest_kld.gate.result import GateResult

SPREAD = "--kld-windows-from=spread"


def speaking(windows_from: str | None, *datasets: tuple[str, int, int | None]) -> GateResult:
    """A result with intervals, of windows of 100 tokens at stride 50: name, windows and tokens of each dataset."""
    result = made_result("candidate", confidence=0.9)
    named = [dict(zip(("dataset", "windows", "text_tokens"), one, strict=True)) for one in datasets]
    protocol = {"windows_from": windows_from, "stride": 50, "window_size": 100, "datasets": named}
    assert result.about is not None
    result.about["protocol"] = {**protocol, "windows": sum(one[1] for one in datasets)}
    return result


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (speaking("start", ("a", 10, 2000)), "this stretch: the first 28 % of a (--kld-windows-from=spread takes "),
        (speaking("start", ("a", 10, 200_000)), "this stretch: the first 0.3 % of a ("),
        (speaking("start", ("a", 39, 2051)), "this stretch: the first 98 % of a ("),  # one more would fit
        (speaking("start", ("a", 39, 2049)), "all of a"),  # none would
        (speaking("start", ("a", 10, 2000), ("b", 1, 120)), "these stretches: the first 28 % of a, all of b ("),
        (speaking("spread", ("a", 10, 2000)), "all of a"),
        (speaking("spread", ("a", 10, 2000), ("b", 2, 3000)), "all of a, all of b"),
    ],
)
def test_the_note_on_intervals_says_what_they_speak_for(result: GateResult, words: str) -> None:
    (note,) = (note for note in result.notes if note.startswith("the intervals"))
    assert note.startswith(f"the intervals speak for {words}")
    assert dict(result.properties())["kld_speaks_for"] == note.removeprefix("the intervals speak for ")


@pytest.mark.parametrize(
    "result", [speaking(None, ("a", 10, None)), made_result("candidate")], ids=["own windows", "no intervals"]
)
def test_nothing_is_said_of_unknown_texts_and_without_intervals(result: GateResult) -> None:
    assert not any("intervals" in note for note in result.notes)
    assert "kld_speaks_for" not in dict(result.properties())


def reported(gate: Gate) -> dict[str, Any]:
    (result,) = json.loads((gate.path / "report.json").read_text())["results"]
    return dict(result)


@pytest.mark.slow
def test_each_round_of_spread_windows_goes_over_all_of_the_text(gate: Gate, tmp_path: Path) -> None:
    """8 windows of 256 tokens decide, of 16 that are spread over python-docs; see test_rounds.py for the number."""
    result = gate.pytester.runpytest(
        *(f"--kld-ref={gate.reference}", f"--kld-candidate={gate.candidate}", f"--kld-cache-dir={tmp_path}"),
        *("--kld-dataset=python-docs", "--kld-windows=auto:16", "--kld-window-size=256", "--kld-stride=256", SPREAD),
        *("--kld-max-mean=5", "--kld-json=report.json"),
    )
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["note: the intervals speak for all of python-docs"])
    gated = reported(gate)
    protocol = gated["about"]["protocol"]
    assert (protocol["windows"], protocol["windows_from"]) == (8, "spread")
    tokens = protocol["datasets"][0]["text_tokens"]
    captures: dict[int, Capture] = {}
    for path in tmp_path.glob("captures/*/capture.json"):
        capture = Capture.open(path.parent)
        captures[capture.windows] = capture
    assert set(captures) == {1, 2, 4, 8}
    assert (captures[8].path / "windows" / "00000.safetensors").stat().st_nlink == 4
    starts = sorted(window["start"] for window in gated["diagnosis"]["worst_windows"])  # all eight of them
    assert len(starts) == 8
    eighth = tokens / 8
    # The places are those of every second of 16 windows, each in the middle of a sixteenth.
    assert all(abs(start + 128 - (k + 0.25) * eighth) < 512 for k, start in enumerate(starts))


def test_spread_and_contiguous_windows_do_not_share_captures(gate: Gate, tmp_path: Path) -> None:
    cache = f"--kld-cache-dir={tmp_path}"
    gate(cache, "--kld-json=report.json", "--kld-confidence=0.9", "--kld-inconclusive=pass")
    contiguous = reported(gate)
    assert contiguous["about"]["protocol"]["windows_from"] == "start"
    assert any("this stretch: the first " in note for note in contiguous["notes"])
    gate(cache, "--kld-json=report.json", SPREAD)
    spread = reported(gate)
    digests = {one["about"]["protocol"]["token_ids_sha256"] for one in (contiguous, spread)}
    assert len(digests) == len(list(tmp_path.glob("scores/*.safetensors"))) == 2
    assert not any("intervals" in note for note in spread["notes"])


def test_a_projects_own_windows_take_no_spread(gate: Gate) -> None:
    gate.pytester.makeconftest("""
        import dataclasses, pytest

        @pytest.fixture(scope="session")
        def kld_windows(kld_windows):
            return dataclasses.replace(kld_windows, token_ids=kld_windows.token_ids[:, :16].copy(), taken_from=None)
    """)
    gate.pytester.makepyfile("def test_short(kld): assert kld.summary.positions == 48")
    gate().assert_outcomes(passed=1)
    result = gate(SPREAD)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*--kld-windows-from=spread has no effect here: the project's own fixture*"])


def test_several_datasets_are_spread_each_over_its_own_text(gate: Gate, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("one two three four five six seven " * 200, encoding="utf-8")
    both = ("--kld-dataset=python-docs", f"--kld-dataset={tmp_path / 'words.txt'}")
    gate.pytester.makepyfile("""
        def test_windows(kld, kld_windows):
            first, second = kld_windows.parts
            for part in kld_windows.parts:
                assert min(part.starts) < 0.3 * part.text_tokens
                assert max(part.starts) > 0.6 * part.text_tokens
            assert list(kld.scores.evidence["starts"]) == [*first.starts, *second.starts]
            assert kld.scores.by_dataset()[second.dataset].evidence["starts"].tolist() == second.starts.tolist()
    """)
    result = gate.pytester.runpytest(
        *(f"--kld-ref={gate.reference}", f"--kld-candidate={gate.candidate}", f"--kld-cache-dir={tmp_path / 'cache'}"),
        *(*both, "--kld-windows=3", "--kld-window-size=64", "--kld-stride=16", SPREAD, "--kld-confidence=0.9"),
        *("--kld-inconclusive=pass", "--kld-max-mean=5"),
    )
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["note: the intervals speak for all of python-docs, all of *words.txt"])


def test_starts_are_stored_with_the_scores(gate: Gate) -> None:
    gate.pytester.makepyfile("""
        def test_places(kld, kld_windows):
            assert kld.scores.evidence["starts"].tolist() == kld_windows.starts.tolist()
            assert kld_windows.starts.tolist() != sorted(kld_windows.starts.tolist())
    """)
    gate(SPREAD).assert_outcomes(passed=1)
