"""The gate without any test file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conftest import SMALL_RUN

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_runs_one_test_per_candidate_and_passes_or_fails_by_the_figures(
    pytester: pytest.Pytester, reference_dir: Path, candidate_dir: Path, broken_dir: Path
) -> None:
    result = pytester.runpytest(
        f"--kld-ref={reference_dir}",
        f"--kld-candidate={candidate_dir}",
        f"--kld-candidate={broken_dir}",
        "--kld-max-mean=0.1",
        f"--kld-cache-dir={pytester.path / 'cache'}",
        *SMALL_RUN,
    )
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        ["*1 of 4 KLD limits exceeded: *broken against *reference*", "*FAIL  mean KLD*max_mean 0.1*"]
    )
