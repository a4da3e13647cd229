from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from conftest import SMALL_RUN

from pytest_kld.report.diagnosis import diagnosis_lines

if TYPE_CHECKING:
    from pathlib import Path

HOSTILE = "\x1b[2J\x07 a\u202eb\r\n"


def a_diagnosis(text: str | None) -> dict[str, Any]:
    top = [{"id": token_id, "text": text, "p": 0.25} for token_id in range(5)]
    return {
        "patterns": [{"name": "implausible", "explanation": "Words.", "evidence": f"token {text!r}"}],
        "worst_positions": [
            {
                "window": 3,
                "position": 102,
                "source_position": 614,
                "context": text,
                "label": 17,
                "label_text": text,
                "kl": 3.99781,
                "delta_p": -0.31,
                "reference_top": top,
                "candidate_top": top,
            }
        ]
        * 32,
        "worst_windows": [{"window": number, "start": 0, "mean_kl": 0.3, "max_kl": 4.0} for number in range(8)],
        "top1pct_share": 0.087,
        "by_confidence": [{"low": 0.0, "high": 0.1, "positions": 0, "mean_kl": None}]
        + [{"low": 0.1, "high": 0.9, "positions": 10, "mean_kl": 0.12}] * 6,
        "by_position": [{"start": 16 * part, "stop": 16 * part + 16, "mean_kl": 0.1} for part in range(16)],
        "by_token_class": [{"class": "digit", "positions": 10, "mean_kl": 0.3, "share": 0.2}] * 6,
        "vocabulary": [{"id": 5, "text": text, "contribution": sign * 0.01} for sign in (1,) * 16 + (-1,) * 16],
    }


def test_no_control_character_reaches_the_terminal() -> None:
    lines = diagnosis_lines(a_diagnosis(HOSTILE))
    assert all(line.isprintable() for line in lines)
    assert any(r"'\x1b[2J\x07 a\u202eb\r\n' 0.250" in line for line in lines)


@pytest.mark.parametrize("text", [" the", None, HOSTILE])
def test_the_section_is_short_and_narrow(text: str | None) -> None:
    lines = diagnosis_lines(a_diagnosis(text))
    assert len(lines) <= 30
    assert max(map(len, lines[:-8])) <= 120


def test_without_texts_ids_are_shown() -> None:
    lines = "\n".join(diagnosis_lines(a_diagnosis(None)))
    assert "window 3, position 102: KL 3.998, Δp -0.310; then id 17\n  reference id 0 0.250, id 1 0.250" in lines


def test_a_diagnosis_without_pattern_says_so() -> None:
    assert diagnosis_lines({**a_diagnosis(None), "patterns": []})[0] == "no known pattern"


def test_the_position_parts_shown_include_first_and_last() -> None:
    [line] = [line for line in diagnosis_lines(a_diagnosis(None)) if "by position" in line]
    assert line == "  by position in the window: 0-16 0.1, 80-96 0.1, 160-176 0.1, 240-256 0.1"


def test_a_failed_gate_shows_its_diagnosis_and_a_passed_one_does_not(
    pytester: pytest.Pytester, reference_dir: Path, candidate_dir: Path, broken_dir: Path
) -> None:
    candidates = (f"--kld-candidate={path}" for path in (candidate_dir, broken_dir))
    result = pytester.runpytest_inprocess(
        *(f"--kld-ref={reference_dir}", *candidates, "--kld-max-mean=0.1", "--kld-cache-dir=cache"),
        *("--kld-json=report.json", *SMALL_RUN),
    )
    result.assert_outcomes(passed=1, failed=1)
    lines = result.outlines
    section = lines.index(next(line for line in lines if "kld diagnosis" in line))
    assert any("KLD limits exceeded" in line for line in lines[:section])
    assert sum("kld diagnosis" in line for line in lines) == 1
    results = json.loads((pytester.path / "report.json").read_text())["results"]
    for one in results:
        assert one["diagnosis"]["worst_positions"][0]["kl"] == one["figures"]["max"]
        assert isinstance(one["diagnosis"]["worst_positions"][0]["label_text"], str)
    assert results[0]["diagnosis"]["patterns"] == []
