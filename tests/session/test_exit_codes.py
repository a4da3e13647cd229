"""Cases in which pytest's exit code is 0, by design, although a gate did not pass. docs/reference.md lists them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Gate


def test_expected_failure_that_could_not_be_measured_succeeds_and_is_an_error_in_the_report(
    gate: Gate, unloadable_dir: Path
) -> None:
    gate.pytester.makepyfile("""
        import pytest
        @pytest.mark.xfail
        @pytest.mark.kld(max_mean=0.1)
        def test_gate(): pass
    """)
    result = gate("--kld-json=report.json", candidates=(unloadable_dir,))
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(xfailed=1)
    result.stdout.re_match_lines([rf"{unloadable_dir} .* ERROR "])
    (outcome,) = gate.results()
    assert (outcome["outcome"], outcome["xfail"], outcome["figures"]) == ("error", True, None)


def test_gate_that_k_deselects_is_not_measured_and_the_session_succeeds(gate: Gate) -> None:
    gate.pytester.makepyfile("""
        def test_gate(kld): pass
        def test_plain(): pass
    """)
    result = gate("-k", "plain", "--kld-max-mean=1e-9", "--kld-json=report.json")
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(passed=1, deselected=1)
    result.stdout.no_fnmatch_line("KLD Evaluation Results*")
    assert gate.results() == []
