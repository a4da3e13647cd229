"""What the terminal shows: header, progress, table, notes."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from made import made_speed

from pytest_kld.gate.result import GateResult
from pytest_kld.gate.speed import judge_speed
from pytest_kld.report import terminal
from pytest_kld.report.terminal import TerminalTask, format_seconds, notes, table
from pytest_kld.subjects.subject import Subject

if TYPE_CHECKING:
    from conftest import Gate

FIGURES = {
    "positions": 8192,
    "skipped": 0,
    "mean": 0.0123456,
    "median": 0.01,
    "p95": 0.05,
    "p99": 0.25,
    "max": 1.5,
    "candidate_nan_count": 0,
    "reference_nan_count": 0,
    "top1_agreement": 0.9876,
    "js": None,
}
ABOUT = {"protocol": {"dataset": "python-docs"}, "reference": {"key": None}, "candidate": {"key": None}}


def result(candidate: str, outcome: str, *, xfail: bool = False, **figures: float) -> GateResult:
    measured = None if outcome == "error" else {**FIGURES, **figures}
    return GateResult(
        nodeid=f"test[{candidate}]",
        reference=Subject(name="A"),
        candidate=Subject(name=candidate),
        outcome=outcome,  # type: ignore[arg-type]
        figures=measured,
        about=None if measured is None else ABOUT,
        xfail=xfail,
    )


def test_table_has_a_row_per_candidate_whatever_became_of_it() -> None:
    lines = table(
        [
            result("error", "error"),
            result("fine", "passed"),
            result("bad", "failed", mean=0.5, max=float("inf"), candidate_nan_count=1234, reference_nan_count=7),
            result("expected", "failed", xfail=True),
        ]
    )
    assert lines[0] == "KLD Evaluation Results (ref: A, dataset: python-docs, 8,192 positions)"
    names = ["Model", "Mean KLD", "Median KLD", "P95 KLD", "P99 KLD", "Max KLD", "NaN", "Top-1", "Verdict", "Band"]
    assert " ".join(lines[1].split()) == " ".join(names)
    assert [line.split() for line in lines[3:]] == [
        ["error", *"-------", "ERROR", "-"],
        ["fine", "0.012346", "0.010000", "0.050000", "0.250000", "1.5000", "0", "98.76%", "pass", "good"],
        [
            "bad",
            "0.500000",
            "0.010000",
            "0.050000",
            "0.250000",
            "inf",
            "1,234",
            "(ref",
            "7)",
            "98.76%",
            "FAIL",
            "significant",
        ],
        ["expected", "0.012346", "0.010000", "0.050000", "0.250000", "1.5000", "0", "98.76%", "xfail", "good"],
    ]


def test_worst_of_a_candidates_tests_decides_its_row() -> None:
    for outcomes, verdict in (
        (("passed", "failed", "error"), "ERROR"),
        (("failed", "passed"), "FAIL"),
        (("passed", "passed"), "pass"),
    ):
        (row,) = table([result("B", outcome) for outcome in outcomes])[3:]
        assert f" {verdict} " in row


def test_different_engines_are_noted_once() -> None:
    def about(reference: str, candidate: str) -> dict[str, Any]:
        return {
            side: {"key": {"engine": {"engine": name}}}
            for side, name in (("reference", reference), ("candidate", candidate))
        }

    mixed = GateResult(
        nodeid="n",
        reference=Subject(name="A"),
        candidate=Subject(name="B"),
        outcome="passed",
        about=about("sglang", "transformers"),
    )
    same = GateResult(
        nodeid="m",
        reference=Subject(name="A"),
        candidate=Subject(name="C"),
        outcome="passed",
        about=about("sglang", "sglang"),
    )
    assert notes([same, result("unknown", "passed"), result("error", "error")]) == []
    (note,) = notes([mixed, mixed, same])
    assert note.startswith("note: B ran in transformers and the reference in sglang: ")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (61, "1 min 01 s"), (3599, "59 min 59 s"), (3725, "1 h 02 min")],
)
def test_durations_are_said_as_people_say_them(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


class Lines:
    """Takes the place of the terminal."""

    seconds_between_lines = 10.0

    def __init__(self) -> None:
        self.lines: list[str] = []

    def _write(self, line: str, *, last: bool) -> None:
        assert last == ("done" in line)
        self.lines.append(line)


def test_progress_tells_windows_rate_and_time_left_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    lines = Lines()
    task = TerminalTask(lines, "capture A", 10, 2)  # type: ignore[arg-type]
    for _ in range(8):
        now[0] += 4
        task.advance()
    task.finish()
    assert lines.lines == [  # what an interrupted session left counts as done, and not towards the rate
        "kld: capture A: 5/10 windows, 0.25 windows/s, 20.0 s left",
        "kld: capture A: 8/10 windows, 0.25 windows/s, 8.0 s left",
        "kld: capture A: 10/10 windows, done in 32.0 s",
    ]


def test_run_shows_header_progress_and_table_in_a_log(gate: Gate, tmp_path: Path) -> None:
    result = gate(f"--kld-cache-dir={tmp_path}")
    result.stdout.re_match_lines(
        [
            rf"kld: pytest-kld \S+, engine transformers \S+, reference {gate.reference}, cache {tmp_path}$",
            rf"kld: the capture of {gate.reference} \(3 windows, store hidden\) needs \S+ MB; .* are free$",
            rf"kld: capture {gate.reference}: 3/3 windows, done in .* s$",
            rf"kld: capture {gate.candidate}: 3/3 windows, done in .* s$",
            rf"kld: compare {gate.candidate}: 3/3 windows, done in .* s$",
            r"KLD Evaluation Results \(ref: .*, dataset: .*text.txt, 192 positions\)$",
        ]
    )
    assert "\r" not in result.stdout.str()


def test_quiet_run_shows_the_table_and_no_progress(gate: Gate, tmp_path: Path) -> None:
    result = gate(f"--kld-cache-dir={tmp_path}", "-q")
    result.stdout.no_fnmatch_line("kld:*")
    result.stdout.fnmatch_lines(["KLD Evaluation Results*"])


def test_progress_works_without_capturing_and_without_a_terminal(gate: Gate, tmp_path: Path) -> None:
    gate(f"--kld-cache-dir={tmp_path / 'a'}", "-p", "no:capture").assert_outcomes(passed=1)
    assert gate(f"--kld-cache-dir={tmp_path / 'b'}", "-p", "no:terminal").ret == pytest.ExitCode.OK


def test_sessions_without_a_gate_say_nothing(gate: Gate) -> None:
    gate.pytester.makepyfile("def test_plain(): pass")
    assert "kld" not in gate.pytester.runpytest_inprocess("-p", "no:cacheprovider").stdout.str().replace("kld-0", "")


def test_terminal_line_is_rewritten_and_kept_within_its_width(tmp_path: Path) -> None:
    (tmp_path / "test_progress.py").write_text("""
import time
from pytest_kld.report.terminal import TerminalProgress

def test_progress(request):
    progress = TerminalProgress(request.config)
    with progress.task("capture " + "long-name-" * 12, 4) as task:
        for _ in range(4):
            time.sleep(0.25)
            task.advance()
    progress.note("a note")
""")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "test_progress.py"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=theirs, stderr=theirs, stdin=theirs, env={**os.environ, "COLUMNS": "80"}
    )
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError:  # Linux' way to say that the other end is closed
        pass
    finally:
        os.close(ours)
    assert process.wait() == 0, shown.decode()
    rewritten = [line for line in shown.decode().replace("\r\n", "\n").split("\r") if line.startswith("kld: capture")]
    assert len(rewritten) == 4
    assert all(len(line) < 80 and "\n" not in line for line in rewritten[:-1])
    assert "4/4 windows, done in 1." in rewritten[-1]
    assert "\nkld: a note" in shown.decode().replace("\r", "\n")


def test_a_candidate_that_differs_nowhere_is_noted_and_passes(gate: Gate) -> None:
    result = gate("--kld-max-mean=0.1", candidates=(gate.reference,))
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["note: KLD of * is exactly 0 at every position: *"])


def test_speeds_are_shown_in_two_tables_with_the_reference_first_and_the_checks_below() -> None:
    speed = judge_speed(
        made_speed({1: [30, 32, 31], 16: [400, 410, 420]}),
        {"min_speedup": {16: 1.5}},
        base=made_speed({1: [20, 21, 22], 16: [200, 205, 210]}),
        base_label="the reference",
        confidence=None,
    )
    lines = table([replace(result("fast", "passed"), speed=speed.to_json())])
    start = lines.index("Output tokens/s (32 tokens in, 8 out, median of 3 rounds, on H100)")
    assert [line.split() for line in lines[start + 1 : start + 5 : 1] if not line.startswith("-")] == [
        ["Model", "C=1", "C=16"],
        ["the", "reference", "21.0", "205.0"],
        ["fast", "31.0", "410.0"],
    ]
    assert "ok   fast: speedup in output tokens/s over the reference at concurrency 16 2 >= min_speedup 1.5" in lines
    assert any(line.split()[:2] == ["fast", "16"] for line in lines)
