"""What the HTML report shows, before it is HTML."""

from __future__ import annotations

import math

import pytest
from made import error_result, made_result, subject

from pytest_kld.report.view import short_names, view


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["quickstart/models/int8", "quickstart/models/fp8/"], ["int8", "fp8"]),
        (["org/model"], ["model"]),
        (["a/model", "b/model"], ["a/model", "b/model"]),
        (["org/model (triton)", "org/model (cutlass)"], ["model (triton)", "model (cutlass)"]),
        (["/"], ["/"]),
    ],
)
def test_names_are_cut_to_their_ends_where_these_tell_them_apart(names: list[str], short: list[str]) -> None:
    assert short_names(names) == short


def test_headline_counts_candidates_by_the_test_that_decides() -> None:
    results = [made_result("a"), made_result("a", scale=9, nodeid="other"), made_result("b"), error_result("c")]
    report = view(results)
    assert report.headline == "3 candidates: 1 not measured, 1 failed, 1 passed"
    assert report.outcome == "error"
    assert view([made_result("a")]).headline == "1 candidate: 1 passed"
    assert view([]).outcome == "none"
    expected = view([made_result("a", scale=9, xfail=True)])
    assert (expected.headline, expected.outcome) == ("1 candidate: 1 failed as expected", "expected")


def test_two_tests_of_a_candidate_have_a_row_for_each_of_their_bounds() -> None:
    strict = made_result("a", bounds={"max_mean": 0.001, "max_nan": 0}, nodeid="strict")
    report = view([made_result("a"), strict])
    rows = {limit.name: [(row.bound, row.state) for row in limit.rows] for limit in report.limits}
    assert rows == {"max_mean": [(0.05, "pass"), (0.001, "fail")], "max_nan": [(0, "pass")]}


def test_backends_make_a_matrix_that_shows_what_was_not_measured() -> None:
    results = [
        made_result(subject("x", "triton"), scale=0.001),
        made_result(subject("x", "cutlass"), scale=0.1),
        made_result(subject("y", "triton"), scale=0.01),
        error_result(subject("y", "cutlass")),
        made_result("z"),
    ]
    matrix = view(results).matrix
    assert matrix is not None
    assert matrix.columns == ["triton", "cutlass"]
    assert list(matrix.cells) == ["x", "y"]
    means = {result.candidate.label: result.figures["mean"] for result in results if result.figures}
    assert matrix.cells["x"] == {"triton": (means["x (triton)"], 0), "cutlass": (means["x (cutlass)"], 1)}
    middle = matrix.cells["y"]["triton"]
    assert middle is not None
    span = math.log(means["x (cutlass)"] / means["x (triton)"])
    assert middle[1] == pytest.approx(math.log(means["y (triton)"] / means["x (triton)"]) / span)
    assert matrix.cells["y"]["cutlass"] is None
    assert view([made_result("z")]).matrix is None


def test_thirty_two_candidates_are_drawn_in_ways_that_differ() -> None:
    report = view([made_result(f"candidate-{number}") for number in range(32)])
    assert len({(candidate.colour, candidate.dash) for candidate in report.candidates}) == 32


def test_histogram_table_has_every_bin_and_every_candidates_count() -> None:
    report = view([made_result("a"), made_result("bb", scale=1), error_result("c")])
    rows = report.histogram_rows()
    assert [row[0] for row in rows] == sorted({row[0] for row in rows})
    totals = [sum(counts[place] for *_, counts in rows) for place in range(2)]
    assert totals == [candidate.figures["positions"] for candidate in report.measured]
