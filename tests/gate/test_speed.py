"""Limits on speed: how they are written, and the verdict."""

from __future__ import annotations

import math
from typing import Any

import pytest
from made import made_speed

from pytest_kld.errors import ServerError
from pytest_kld.gate.limits import parse_marker
from pytest_kld.gate.number import shown
from pytest_kld.gate.speed import judge_speed
from pytest_kld.gate.speed_limits import SPEED_LIMITS, at_each, concurrencies, parse_speed_marker


@pytest.mark.parametrize(
    ("value", "bounds"),
    [
        *(("30", {None: 30}), (30, {None: 30}), ("0.5", {None: 0.5}), ({4: 7}, {4: 7}), ("4: 7", {4: 7})),
        *(("1:30,16:400.5", {1: 30, 16: 400.5}), ("100000:1", {100_000: 1})),
    ],
)
def test_a_bound_is_for_all_concurrencies_or_for_those_it_names(value: object, bounds: object) -> None:
    assert SPEED_LIMITS["min_output_tps"].parse(value) == bounds


@pytest.mark.parametrize(
    "value",
    [
        *("", "fast", "0", "-1", "nan", "1:", ":5", "0:5", "1:5,1:6", "1:2:3", "1.5:3", "100001:1"),
        *(True, None, [], {"x": 1}, 1e400, 10**400, math.nan, 0),
    ],
    ids=shown,
)
def test_a_bound_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"expected|twice") as caught:
        SPEED_LIMITS["max_ttft"].parse(value)
    assert "None" not in str(caught.value) or value is None


@pytest.mark.parametrize("value", ["", "0", "1,1", "1,x", "1.5", [], [True], 0, "9999999"])
def test_concurrencies_are_different_whole_numbers(value: object) -> None:
    with pytest.raises(ValueError, match=r"expected .*, got [^N]"):
        concurrencies(value)
    assert concurrencies("1, 4,16") == concurrencies([1, 4, 16]) == (1, 4, 16)


def test_a_bound_at_a_concurrency_wins_over_one_for_all_and_one_that_is_not_measured_is_refused() -> None:
    assert at_each({"max_ttft": {None: 50, 4: 90}}, (1, 4)) == {"max_ttft": {1: 50, 4: 90}}
    with pytest.raises(ValueError, match="max_ttft has a bound at concurrency 8, but --kld-throughput is 1,4"):
        at_each({"max_ttft": {8: 50}}, (1, 4))
    with pytest.raises(ValueError, match="at concurrency 8, but --kld-throughput is none"):
        at_each({"max_ttft": {8: 50}}, ())
    assert at_each({"max_ttft": {4: 90}}, (1, 4)) == {"max_ttft": {4: 90}}


def test_a_marker_may_hold_limits_of_both_kinds() -> None:
    kwargs: dict[str, Any] = {"max_mean": 0.05, "throughput": [1, 4], "min_speedup": {4: 1.1}, "max_ttft": None}
    assert parse_marker((), kwargs) == {"max_mean": 0.05}
    assert parse_speed_marker(kwargs) == ((1, 4), {"min_speedup": {4: 1.1}, "max_ttft": None})
    assert parse_speed_marker({"max_mean": 0.05}) == (None, {})
    assert parse_speed_marker({"throughput": None}) == ((), {})
    with pytest.raises(ValueError, match="kld marker, min_speedup: expected a number above 0"):
        parse_speed_marker({"min_speedup": "quick"})


def test_the_median_over_rounds_is_held_against_the_bound() -> None:
    measured = made_speed({4: [90, 100, 150]}, ttft=20)
    bounds = {"min_output_tps": {4: 101}, "max_ttft": {4: 20}}
    verdict = judge_speed(measured, bounds, base=None, base_label="R", confidence=None)
    assert [(check.limit.name, check.state) for check in verdict.checks] == [
        ("min_output_tps", "fail"),
        ("max_ttft", "pass"),
    ]
    assert verdict.state == "fail"
    said = verdict.explain("C")
    assert said.splitlines() == [
        "1 of 2 limits on speed exceeded: C",
        "  FAIL  output tokens/s at concurrency 4 100 tokens/s < min_output_tps 101",
        "  ok    median time to first token at concurrency 4 20 ms <= max_ttft 20",
    ]


def test_a_speed_at_its_bound_passes_and_one_beyond_fails_in_both_directions() -> None:
    measured = made_speed({4: [100]}, ttft=20)

    def said(bounds: dict[str, dict[int, float]]) -> list[str]:
        verdict = judge_speed(measured, bounds, base=None, base_label="R", confidence=None)
        return verdict.explain("C").splitlines()

    assert said({"min_output_tps": {4: 100}}) == [
        "within all limits on speed: C",
        "  ok    output tokens/s at concurrency 4 100 tokens/s >= min_output_tps 100",
    ]
    assert said({"max_ttft": {4: 19}}) == [
        "1 of 1 limits on speed exceeded: C",
        "  FAIL  median time to first token at concurrency 4 20 ms > max_ttft 19",
    ]


def test_a_latency_passes_only_if_the_upper_end_of_its_interval_is_within_the_bound() -> None:
    measured = made_speed({1: [10] * 6})
    for index, one in enumerate(measured["cells"][0]["rounds"]):
        one["ttft"] = 10.0 + index  # six rounds: the interval at 0.95 is from the least to the greatest
    for bound, state in ((15, "pass"), (14, "inconclusive"), (10, "inconclusive"), (9, "fail")):
        verdict = judge_speed(measured, {"max_ttft": {1: bound}}, base=None, base_label="R", confidence=0.95)
        assert verdict.state == state


def test_the_verdict_on_a_speedup_names_its_base_and_keeps_both_measurements() -> None:
    base, measured = made_speed({1: [100]}), made_speed({1: [150]})
    bounds = {"min_speedup": {1: 1.2}, "min_output_tps": {1: 1}}
    verdict = judge_speed(measured, bounds, base=base, base_label="R", confidence=None)
    assert verdict.explain("C").splitlines()[1] == (
        "  ok    speedup in output tokens/s over R at concurrency 1 1.5 >= min_speedup 1.2"
    )
    assert [check.base for check in verdict.checks] == ["R", None]
    told = verdict.to_json()
    assert (told["candidate"], told["base"], told["base_label"]) == (measured, base, "R")


@pytest.mark.parametrize(("bound", "state"), [(0.5, "pass"), (1.05, "inconclusive"), (2.0, "fail")])
def test_with_a_confidence_the_interval_of_the_speedup_decides(bound: float, state: str) -> None:
    base = made_speed({1: [100, 101, 102, 103, 99, 98, 97]})
    measured = made_speed({1: [105, 106, 107, 108, 104, 103, 102]})
    verdict = judge_speed(measured, {"min_speedup": {1: bound}}, base=base, base_label="R", confidence=0.95)
    assert verdict.state == state
    assert verdict.checks[0].value == pytest.approx(1.05)
    (headline, line) = verdict.explain("C").splitlines()
    words = {"pass": "within all limits on speed", "fail": "1 of 1 limits on speed exceeded"}
    assert headline == words.get(state, "1 of 1 limits on speed inconclusive") + ": C"
    assert line.split()[0] == {"pass": "ok", "inconclusive": "?", "fail": "FAIL"}[state]


def test_too_few_rounds_are_inconclusive_and_the_message_says_how_many_are_needed() -> None:
    measured = made_speed({1: [100.0, 101.0, 102.0]})
    verdict = judge_speed(measured, {"min_output_tps": {1: 1}}, base=None, base_label="R", confidence=0.95)
    assert verdict.state == "inconclusive"
    assert verdict.explain("C").splitlines()[1] == (
        "  ?     output tokens/s at concurrency 1 101 tokens/s >= min_output_tps 1; too few rounds for confidence "
        "0.95: at least 6 are needed, and there are 3"
    )


def test_a_speedup_over_other_devices_or_over_nothing_is_an_error() -> None:
    measured = made_speed({1: [100.0]})
    bounds = {"min_speedup": {1: 1.0}}
    with pytest.raises(ServerError, match=r"needs the speed of R, which was not measured.* with --kld-speedup-over$"):
        judge_speed(measured, bounds, base=None, base_label="R", confidence=None)
    base = made_speed({1: [100.0]}, device="H200")
    with pytest.raises(ServerError, match="ran on H100 and R on H200"):
        judge_speed(measured, bounds, base=base, base_label="R", confidence=None)
