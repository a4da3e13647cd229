"""How long a capture took, from manifests that anybody may have written."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_kld.captures.timing import Timing

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
