"""How long a capture took, from manifests that anybody may have written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from recorded import transformers_subject

from pytest_kld.captures.timing import EarlierRuns, Timing
from pytest_kld.subjects.subject import Subject

TOLD = {"loading": 1.5, "running": 2, "positions": 64}


def test_a_timing_comes_back_from_its_manifest() -> None:
    timing = Timing(loading=1.5, running=2.0, positions=64)
    assert Timing.of({"timing": timing.to_json()}) == timing


@pytest.mark.parametrize(
    "odd",
    [
        *({"positions": 0}, {"positions": 0.5}, {"running": -1}, {"running": float("nan")}, {"loading": float("inf")}),
        *({"loading": "1"}, {"loading": True}, {"running": None}, {"running": [1]}, {"positions": 1e300}),
    ],
)
def test_a_timing_of_no_use_is_none(odd: dict[str, Any]) -> None:
    assert Timing.of({"timing": {**TOLD, **odd}}) is None


@pytest.mark.parametrize("told", [None, [], "1 s", 3])
def test_a_manifest_without_a_timing_has_none(told: Any) -> None:
    assert Timing.of({"timing": told}) is None
    assert Timing.of({}) is None


def test_the_same_arguments_count_before_others_and_the_slowest_of_them() -> None:
    def ran(seconds: float, **arguments: Any) -> tuple[dict[str, Any], Timing]:
        return subject(**arguments).to_json(), Timing(loading=seconds, running=2 * seconds, positions=10)

    def subject(**arguments: Any) -> Subject:
        return transformers_subject(Path("org/one"), **arguments)

    earlier = EarlierRuns(runs=(ran(1, dtype="float32"), ran(2, dtype="float32"), ran(9, dtype="bfloat16")))
    assert earlier.seconds(subject(dtype="float32"), 100) == (2, 40)
    assert earlier.seconds(subject(dtype="bfloat16"), 100) == (9, 180)
    assert earlier.seconds(subject(dtype="float16"), 100) == (9, 180)
    assert earlier.seconds(transformers_subject(Path("org/other")), 100) is None
