"""A project's own fixtures and markers that are added late cannot switch the gate off."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Gate

WRAPPER = """
    import pytest

    @pytest.fixture
    def kld(kld):
        return {"mean": kld.mean}
"""
OTHER_MEANING = """
    import pytest

    @pytest.fixture
    def kld():
        return "something else"
"""


@pytest.mark.parametrize("conftest", [WRAPPER, OTHER_MEANING], ids=["wrapper", "other meaning"])
def test_a_marked_test_is_gated_whatever_a_fixture_named_kld_returns(gate: Gate, conftest: str) -> None:
    gate.pytester.makeconftest(conftest)
    gate.pytester.makepyfile("import pytest\n@pytest.mark.kld(max_mean=1e-9)\ndef test_gate(kld): assert kld")
    result = gate()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["1 of 4 KLD limits exceeded*", "  FAIL  mean KLD *"])


def test_limits_of_the_command_line_reach_a_test_behind_a_wrapper(gate: Gate) -> None:
    gate.pytester.makeconftest(WRAPPER)
    gate.pytester.makepyfile("def test_gate(kld): assert kld['mean'] > 0")
    result = gate("--kld-max-mean=1e-9")
    # Older releases of pytest do not see our fixture behind the wrapper, so there the built-in gate runs as well.
    assert set(result.parseoutcomes()) == {"failed"}
    result.stdout.fnmatch_lines(["FAILED *::test_gate*"])


def test_candidates_are_measured_if_kld_means_something_else(gate: Gate) -> None:
    gate.pytester.makeconftest(OTHER_MEANING)
    gate.pytester.makepyfile("def test_mine(kld): assert kld == 'something else'")
    result = gate("--kld-max-mean=1e-9")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["FAILED kld::test_kld*"])
    without = gate("--kld-max-mean=1e-9", candidates=())
    assert without.ret == pytest.ExitCode.USAGE_ERROR
    without.stderr.fnmatch_lines(["*--kld-max-mean is given, but there is nothing to gate*"])


GETTER = "def test_gate(request): assert request.getfixturevalue('kld').mean > 0"


def test_a_test_that_gets_the_fixture_as_it_runs_is_gated(gate: Gate) -> None:
    gate.pytester.makeini(f"[pytest]\nkld_candidate = {gate.candidate}\nkld_max_mean = 1e-9")
    gate.pytester.makepyfile(GETTER)
    gate(candidates=()).assert_outcomes(failed=1)


def test_a_test_that_gets_the_fixture_as_it_runs_measures_one_candidate_or_none(gate: Gate) -> None:
    gate.pytester.makeini(f"[pytest]\nkld_candidate =\n    {gate.candidate}\n    {gate.reference}")
    gate.pytester.makepyfile(GETTER)
    result = gate(candidates=())
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*there are 2 candidates, but this test runs only once*"])


@pytest.mark.parametrize(
    ("test", "said"),
    [
        ("request.applymarker(pytest.mark.kld(max_mean=1))", "*nothing was measured, so its limits were not checked*"),
        (
            "request.getfixturevalue('kld'); request.applymarker(pytest.mark.kld(max_mean=1e-9))",
            "*its kld markers changed after its figures were computed*",
        ),
    ],
    ids=["nothing measured", "measured before"],
)
def test_a_marker_that_arrives_too_late_is_an_error(gate: Gate, test: str, said: str) -> None:
    gate.pytester.makeini(f"[pytest]\nkld_candidate = {gate.candidate}")
    gate.pytester.makepyfile(f"import pytest\ndef test_late(request): {test}")
    result = gate(candidates=())
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([said])


def test_a_candidate_of_the_command_line_that_no_test_measures_is_refused(gate: Gate) -> None:
    gate.pytester.makepyfile(f"""
        import pytest

        @pytest.mark.parametrize("kld_candidate", [{str(gate.reference)!r}], indirect=True)
        def test_own(kld): pass
    """)
    result = gate()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*--kld-candidate={gate.candidate} is given, but no collected test measures it*"])
    gate(candidates=()).assert_outcomes(passed=1)
