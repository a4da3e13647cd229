"""What a result says of itself: notes, properties, and what is missing from a session."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from made import made_result, made_speed, with_floor

from pytest_kld.figures.interval import Interval
from pytest_kld.gate.limits import LIMITS
from pytest_kld.gate.regression import Change
from pytest_kld.gate.result import GateResult, Incomplete

RESULT = made_result("A4B")


def described(**sides: Any) -> GateResult:
    """A result whose two sides say more of themselves."""
    about = RESULT.about or {}
    return replace(RESULT, about={**about, **{side: {**about[side], **more} for side, more in sides.items()}})


def test_windows_of_a_result_are_counted_by_dataset() -> None:
    parts = [{"dataset": "prose", "windows": 3}, {"dataset": "code", "windows": 5}]
    result = replace(made_result("a"), about={"protocol": {"windows": 8, "datasets": parts}})
    assert [result.windows_of(name) for name in ("prose", "code", None)] == [3, 5, 8]
    assert replace(result, about=None).windows_of("prose") == 0


@pytest.mark.parametrize(
    ("planned", "missing", "words"),
    [
        (1, 1, "1 of 1 gated test was not measured"),
        (3, 1, "1 of 3 gated tests was not measured"),
        (3, 2, "2 of 3 gated tests were not measured"),
    ],
)
def test_an_interrupted_session_says_how_many_tests_are_missing(planned: int, missing: int, words: str) -> None:
    told = Incomplete(reason="Ctrl-C", planned=planned, not_measured=("kld::a",) * missing)
    assert str(told) == f"the session ended early (Ctrl-C); {words}"


@pytest.mark.parametrize(("ours", "theirs", "wider"), [(1024, 1000, "A4B"), (1000, 1024, "reference")])
def test_vocabularies_of_other_sizes_are_noted_with_the_wider_one_and_its_mass(
    ours: int, theirs: int, wider: str
) -> None:
    result = described(reference={"vocab_size": theirs}, candidate={"vocab_size": ours})
    (note,) = replace(result, figures={**(RESULT.figures or {}), "cut_mass": 0.0125}).notes
    assert note == (
        f"the vocabularies differ: reference has {theirs:,} tokens and A4B {ours:,}. The figures cover the first "
        f"1,000, renormalised; {wider} gives the others a probability of up to 0.0125"
    )


def test_equal_or_unknown_vocabularies_are_no_news() -> None:
    assert described(reference={"vocab_size": 9}, candidate={"vocab_size": 9}).notes == []
    assert described(candidate={"vocab_size": 9}).notes == described(reference={"vocab_size": 9}).notes == []


def test_experts_that_were_not_met_or_not_told_are_noted() -> None:
    seen = replace(RESULT, saw={"experts": {"candidate": {"never": 3, "experts": 1024}}})
    assert [note.partition(",")[0] for note in seen.notes] == ["A4B: 3 of 1"]
    assert "A4B: 3 of 1,024 experts were never met" in seen.notes[0]
    unknown = described(reference={"routing": {"unobserved": "no router"}}, candidate={"routing": {"unobserved": None}})
    assert unknown.notes == ["reference: which experts it used is unknown: no router"]


def test_the_server_whose_speed_was_measured_is_noted() -> None:
    speed = {"candidate": made_speed({1: [5.0]}), "base": None, "checks": []}
    (note,) = replace(RESULT, speed=speed).notes
    assert "on the server that captures, which pytest-kld gives --prefill-max-requests 1;" in note
    speed["candidate"]["server"] = {"own": True, "arguments": ["--tp", "2"], "added": [], "others": ["B", "C"]}
    assert replace(RESULT, speed=speed).notes == [
        "the speed of A4B was measured on a server of its own, with --tp 2",
        "beside A4B, servers of B, C were up, and idle, while its speed was measured",
    ]


def test_properties_have_the_intervals_the_changes_and_what_is_below_the_floor() -> None:
    interval = Interval(low=0.25, high=0.5, confidence=0.875, effective_positions=9.0)
    result = replace(
        with_floor(made_result("A4B"), 0.75),
        intervals={"mean": interval.to_json()},
        baseline={"changes": [Change(limit=LIMITS["max_p99"], before=0.5, value=0.75).to_json()], "notes": []},
    )
    found = dict(result.properties())
    assert found["kld_confidence"] == 0.875
    assert (found["kld_mean_low"], found["kld_mean_high"], found["kld_mean_effective_positions"]) == (0.25, 0.5, 9)
    assert (found["kld_baseline_p99"], found["kld_change_p99"]) == (0.5, 0.25)
    assert found["kld_below_floor"] == ", ".join(result.below_floor) != ""
    assert "kld_below_floor" not in dict(RESULT.properties())
