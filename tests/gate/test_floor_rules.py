"""What is below a floor, and which floors are above a limit."""

from __future__ import annotations

import math
from typing import Any

import pytest
from made import made_result

from pytest_kld.errors import FloorError
from pytest_kld.gate.floor import Floor, is_below
from pytest_kld.gate.limits import LIMITS
from pytest_kld.gate.regression import Allowance, changes
from pytest_kld.gate.verdict import Verdict, judge

FIGURES: dict[str, Any] = made_result("a candidate").figures or {}
STILL = {**FIGURES, "mean": 0.0, "top1_agreement": 1.0, "flips": None}


def floor(**candidate: float | None) -> Floor:
    return Floor(reference=STILL, candidate={**STILL, **candidate})


@pytest.mark.parametrize(
    ("difference", "noise", "below"),
    [
        (0.0, 0.0, False),
        (0.1, 0.0, False),
        (0.1, None, False),
        (0.1, 0.05, False),
        (0.0999, 0.05, True),
        (-0.0999, 0.05, True),
        (-0.1, 0.05, False),
        (math.inf, 0.05, False),
        (math.inf, math.inf, True),
    ],
)
def test_a_difference_is_below_if_it_is_less_than_twice_the_floor(
    difference: float, noise: float | None, below: bool
) -> None:
    assert is_below(difference, noise) is below


def test_the_floor_is_that_of_the_worse_side_and_of_a_share_what_it_lacks_of_one() -> None:
    assert floor(mean=0.01).of(LIMITS["max_mean"]) == 0.01
    assert Floor(reference={**STILL, "mean": 0.02}, candidate=STILL).of(LIMITS["max_mean"]) == 0.02
    assert floor(top1_agreement=0.9).of(LIMITS["min_top1"]) == pytest.approx(0.1)
    assert floor().of(LIMITS["max_flips"]) is None
    without = ("max_nan", "max_ref_nan", "max_cut_mass", "max_ppl_ratio", "max_log_ppl_ratio", "min_experts_seen")
    assert [name for name, limit in LIMITS.items() if not limit.floor] == list(without)
    assert [floor().of(LIMITS[name]) for name in without] == [None] * 6


def test_a_check_says_that_its_figure_is_below_and_keeps_its_state() -> None:
    bounds = {"max_mean": 1.0, "min_top1": 0.5}
    figures = {**FIGURES, "mean": 0.01, "top1_agreement": 0.9}
    near = judge(figures, bounds, floor=floor(mean=0.006, top1_agreement=0.94))
    far = judge(figures, bounds, floor=floor(mean=0.004, top1_agreement=0.96))
    assert [check.state for check in near.checks] == ["pass", "pass"]
    assert [check.below_floor for check in near.checks] == [True, True]
    assert [check.below_floor for check in far.checks] == [False, False]
    assert str(near.checks[0]).endswith("below twice the floor of 0.006: not distinguishable from run-to-run noise")
    assert "floor" not in str(far.checks[0])


@pytest.mark.parametrize(
    ("bounds", "noise", "said"),
    [
        ({"max_mean": 0.01}, {"mean": 0.0101}, "mean KLD 0.0101 > max_mean 0.01"),
        ({"max_mean": 0.01}, {"mean": 0.01}, None),
        ({"max_mean": 0.0}, {"mean": 0.0}, None),
        ({"min_top1": 0.95}, {"top1_agreement": 0.9}, "top-1 agreement 0.9 < min_top1 0.95"),
        ({"min_top1": 0.9}, {"top1_agreement": 0.95}, None),
        ({"max_nan": 0}, {"candidate_nan_count": 5}, None),
        ({"max_mean": 0.01}, {"mean": math.inf}, "mean KLD inf > max_mean 0.01"),
    ],
)
def test_a_floor_above_a_limit_is_an_error(bounds: dict[str, float], noise: dict[str, float], said: str | None) -> None:
    verdict = judge(FIGURES, bounds, floor=floor(**noise))
    if said is None:
        verdict.require_finer("a candidate", "the reference")
        return
    with pytest.raises(FloorError, match=r"a candidate against the reference can neither pass nor fail") as caught:
        verdict.require_finer("a candidate", "the reference")
    assert said in str(caught.value)


def test_an_allowance_below_the_floor_is_an_error_and_a_change_below_twice_of_it_is_marked() -> None:
    before = {**FIGURES, "mean": 0.100, "top1_agreement": 0.9}
    now = {**FIGURES, "mean": 0.105, "top1_agreement": 0.9}
    found = changes(before, now, (Allowance.parse("mean:10%"),), floor=floor(mean=0.004))
    mean = found[0]
    assert (mean.state, mean.floor, mean.below_floor) == ("pass", 0.004, True)
    assert "below twice the floor of 0.004" in mean.to_json()["text"]
    Verdict(checks=(), changes=found).require_finer("a candidate", "the reference")
    finer = changes(before, now, (Allowance.parse("mean:1%"),), floor=floor(mean=0.004))
    with pytest.raises(FloorError, match=r"mean KLD 0\.004, and max_regression mean:1% allows 0\.001"):
        Verdict(checks=(), changes=finer).require_finer("a candidate", "the reference")
    assert not changes(before, now, ())[0].below_floor
