"""The result of a matrix, on given figures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from made import made_matrix, made_mean, subject

from pytest_kld.figures.between import Between, Direction
from pytest_kld.figures.interval import Interval
from pytest_kld.gate.matrix import MatrixResult, judge_pair
from pytest_kld.plain import plain


def known(low: float, high: float) -> Interval:
    return Interval(low=low, high=high, confidence=0.9, effective_positions=50.0)


def between(forth: Direction, back: Direction, **datasets: tuple[Direction, Direction]) -> Between:
    return Between(
        forth=forth,
        back=back,
        disagreement=0.0,
        positions=10,
        not_finite=0,
        difference=0.0,
        difference_interval=known(-1, 1),
        datasets=datasets,
    )


def direction(mean: float, interval: Interval | None = None) -> Direction:
    return Direction(mean=mean, p99=mean, max=mean, interval=interval)


def test_the_worse_direction_counts_in_either_order() -> None:
    small, large = direction(0.1), direction(0.3)
    for found, order in ((between(small, large), "b ‖ a"), (between(large, small), "a ‖ b")):
        (check,) = judge_pair("a", "b", found, 0.2, windows={None: 4}, each_dataset=True)
        assert (check.state, check.value) == ("fail", 0.3)
        assert str(check) == f"mean KL({order}) 0.3 nats > max_between 0.2 (over by 0.1, 1.50x the limit)"


@pytest.mark.parametrize(
    ("forth", "back", "state"),
    [
        (known(0.05, 0.15), known(0.05, 0.19), "pass"),
        (known(0.05, 0.15), known(0.05, 0.25), "inconclusive"),
        (known(0.05, 0.25), known(0.21, 0.25), "fail"),
    ],
)
def test_the_direction_in_the_worse_state_counts(forth: Interval, back: Interval, state: str) -> None:
    found = between(direction(0.1, forth), direction(0.1, back))
    (check,) = judge_pair("a", "b", found, 0.2, windows={None: 4}, each_dataset=False)
    assert check.state == state
    assert check.interval == back


def test_each_dataset_is_judged_only_if_asked_for() -> None:
    found = between(
        direction(0.1), direction(0.1), easy=(direction(0), direction(0)), hard=(direction(0), direction(1))
    )
    checks = judge_pair("a", "b", found, 0.2, windows={None: 4, "easy": 3, "hard": 1}, each_dataset=True)
    assert [check.windows for check in checks] == [4, 3, 1]
    assert [(check.dataset, check.state) for check in checks] == [(None, "pass"), ("easy", "pass"), ("hard", "fail")]
    assert "mean KL(b ‖ a) on hard 1 nats" in str(checks[-1])
    assert len(judge_pair("a", "b", found, 0.2, windows={None: 4}, each_dataset=False)) == 1


def test_a_mean_is_that_of_its_direction() -> None:
    matrix = made_matrix("x", ("a", "b", "c"))
    assert matrix.mean("x (a)", "x (c)") == made_mean(0, 2)
    assert matrix.mean("x (c)", "x (a)") == made_mean(2, 0) != made_mean(0, 2)
    assert matrix.mean("x (a)", "x (a)") is None


def test_members_are_named_by_their_axes_if_they_are_of_one_candidate() -> None:
    matrix = made_matrix("x", ("a", "b"))
    assert matrix.short("x (a)") == "a"
    other = replace(matrix, members=(subject("x", "a"), subject("y", "b")))
    assert other.short("x (a)") == "x (a)"


def replace_checks(pair: dict[str, Any], times: int) -> dict[str, Any]:
    """Return a pair with its checks several times, as for several datasets."""
    return {**pair, "checks": pair["checks"] * times}


def test_the_explanation_names_pairs_from_the_worst_to_the_best_and_gaps() -> None:
    matrix = made_matrix("x", ("a", "b", "c"), bound=0.005, gaps={"x (d)": "its test is skipped"})
    assert matrix.explain().splitlines() == [
        "1 of 3 pairs exceed max_between: x",
        "  FAIL  mean KL(x (c) ‖ x (a)) 0.0101 nats > max_between 0.005 (over by 0.0051, 2.02x the limit)",
        "  ok    mean KL(x (b) ‖ x (a)) 0.00101 nats <= max_between 0.005 (within by 0.00399)",
        "  ok    mean KL(x (c) ‖ x (b)) 0.00101 nats <= max_between 0.005 (within by 0.00399)",
        "  -     x (d) is not in the matrix: its test is skipped",
    ]
    assert made_matrix(bound=1).explain().startswith("every pair is within max_between: x\n")
    several = [replace_checks(pair, 2) for pair in matrix.pairs]
    assert replace(matrix, pairs=tuple(several)).explain().startswith("1 of 3 pairs exceed max_between: x\n")
    undecided = made_matrix(bound=0.001, confidence=0.9)
    assert undecided.explain().startswith("1 of 1 pairs inconclusive for max_between: x\n")


def test_properties_have_both_directions_and_escape_names() -> None:
    evil = "\x1b[31m"
    found = dict(made_matrix("x", ("a", evil), bound=1).properties())
    assert found[f"kld_between_mean[a ‖ {plain(evil)}]"] == made_mean(0, 1)
    assert found[f"kld_between_mean[{plain(evil)} ‖ a]"] == made_mean(1, 0)
    assert found["kld_max_between"] == 1
    assert not any("\x1b" in name for name in found)


def test_a_result_comes_back_from_plain_data_and_forged_ones_do_not() -> None:
    matrix = made_matrix("x", ("a", "b"), bound=1, confidence=0.9)
    data = matrix.to_json()
    assert MatrixResult.from_json(data) == matrix
    for wrong in ({"gaps": {"y": "?"}}, {"outcome": "fine"}, {"members": data["members"][:1]}):
        with pytest.raises(ValueError, match="contradicts itself"):
            MatrixResult.from_json({**data, **wrong})


def test_an_open_pair_has_a_question_mark_and_one_below_the_floor_is_known_by_its_mean() -> None:
    undecided = made_matrix(bound=0.001, confidence=0.9)
    assert undecided.explain().splitlines()[1].startswith("  ?     mean KL(")
    (pair,) = undecided.pairs
    first, second = pair["first"], pair["second"]
    assert not undecided.is_below_floor(first, second)
    for noise, below in ((0.0004, False), (0.0006, True)):  # the mean is 0.001
        floored = replace(undecided, pairs=({**pair, "floor": {"mean": noise}},))
        assert floored.is_below_floor(first, second) is below
