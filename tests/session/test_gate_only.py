"""The built-in gate, run by its address, whatever else is in the directory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Gate

ADDRESS = ("--pyargs", "pytest_kld.gate_only")


@pytest.fixture
def project(gate: Gate) -> Gate:
    """A directory with a failing test, its own gate, and a file that cannot be imported."""
    gate.pytester.makepyfile(
        test_failing="def test_failing(): assert False",
        test_own="def test_own(kld): assert False",
        test_broken="import no_such_module",
    )
    return gate


@pytest.mark.parametrize(
    "workers", [pytest.param((), id="alone"), pytest.param(("-n2",), id="xdist", marks=pytest.mark.slow)]
)
def test_runs_the_gate_of_each_candidate_and_no_test_of_the_directory(
    project: Gate, broken_dir: Path, workers: tuple[str, ...]
) -> None:
    candidates = (project.candidate, broken_dir)
    result = project(*ADDRESS, *workers, "--kld-max-mean=0.1", "--kld-json=report.json", candidates=candidates)
    result.assert_outcomes(passed=1, failed=1)
    assert [(row["nodeid"], row["outcome"]) for row in project.results()] == [
        (f"kld::test_kld[{project.candidate}]", "passed"),
        (f"kld::test_kld[{broken_dir}]", "failed"),
    ]


def test_honours_the_directorys_ini_file_and_conftest(project: Gate) -> None:
    project.pytester.makeini(
        f"[pytest]\nkld_ref = {project.reference}\nkld_candidate = {project.candidate}\nkld_max_mean = 1e-9\n"
        "python_files = *.py\npython_functions = check_*\ntestpaths = ."
    )
    project.pytester.makeconftest("""
        import pytest
        @pytest.fixture(scope="session")
        def kld_candidate(kld_reference): return kld_reference
    """)
    run = project.pytester.runpytest_inprocess
    run(*ADDRESS, *project.protocol, project.cache).assert_outcomes(passed=1)
    (project.path / "conftest.py").unlink()
    failed = run(*ADDRESS, *project.protocol, project.cache)
    failed.assert_outcomes(failed=1)
    failed.stdout.fnmatch_lines(["*FAIL  mean KLD * > max_mean 1e-09*"])


def test_can_be_selected_like_any_test(project: Gate, broken_dir: Path) -> None:
    only = (*ADDRESS, "--collect-only", "-q")
    candidates = (project.candidate, broken_dir)
    ids = [f"kld::test_kld[[]{path}]" for path in candidates]
    project(*only, candidates=candidates).stdout.fnmatch_lines([*ids, "*2 tests collected*"])
    project(*only, "-m", "kld", candidates=candidates).stdout.fnmatch_lines(["*2 tests collected*"])
    project(*only, "-k", "broken", candidates=candidates).stdout.fnmatch_lines([ids[1], "*1/2 tests collected*"])
    none = project(*only, "-m", "not kld", candidates=candidates)
    assert none.ret == pytest.ExitCode.NO_TESTS_COLLECTED
    named = project("--pyargs", "pytest_kld.gate_only::test_kld", "--collect-only", "-q", candidates=candidates)
    named.stdout.fnmatch_lines([*ids, "*2 tests collected*"])


@pytest.mark.parametrize(
    "workers", [pytest.param((), id="alone"), pytest.param(("-n2",), id="xdist", marks=pytest.mark.slow)]
)
def test_without_models_is_an_error_that_names_what_is_missing(project: Gate, workers: tuple[str, ...]) -> None:
    run = project.pytester.runpytest_inprocess
    neither = run(*ADDRESS, project.cache, *workers)
    assert neither.ret == (pytest.ExitCode.TESTS_FAILED if workers else pytest.ExitCode.USAGE_ERROR)
    (neither.stdout if workers else neither.stderr).fnmatch_lines(
        ["*pytest_kld.gate_only has nothing to gate: give --kld-ref=MODEL and --kld-candidate=MODEL"]
    )
    if not workers:
        no_candidate = run(*ADDRESS, f"--kld-ref={project.reference}")
        assert no_candidate.ret == pytest.ExitCode.USAGE_ERROR
        no_candidate.stderr.fnmatch_lines(["ERROR: pytest_kld.gate_only has nothing to gate: give --kld-candidate=*"])
        no_reference = run(*ADDRESS, f"--kld-candidate={project.candidate}")
        assert no_reference.ret == pytest.ExitCode.USAGE_ERROR
        no_reference.stderr.fnmatch_lines(["ERROR: *has nothing to gate: give --kld-ref=MODEL"])
