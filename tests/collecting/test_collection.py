"""What is gated, and what is refused before anything is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_kld.gate.limits import LIMITS, MATRIX_LIMITS
from pytest_kld.gate.speed_limits import SPEED_LIMITS

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Gate

UNGATED = "def test_ungated(): pass"


def test_marked_tests_are_gated_wherever_the_mark_is(gate: Gate) -> None:
    gate.pytester.makepyfile(
        test_module="""
            import pytest
            pytestmark = pytest.mark.kld(max_mean=1e-9)
            def test_module_mark(): pass
        """,
        test_others="""
            import pytest

            @pytest.mark.kld(max_mean=1e-9)
            def test_without_fixture(): pass

            @pytest.mark.kld(max_mean=1e-9)
            def test_with_fixture(kld): assert kld.mean > 0

            @pytest.mark.kld(max_mean=1e-9)
            class TestMarked:
                def test_class_mark(self): pass

                @pytest.mark.kld(max_mean=1)
                def test_closest_mark_wins(self): pass

                @pytest.mark.kld(max_p99=1)
                def test_closest_mark_that_names_the_limit_wins(self): pass

            def test_fixture_alone_is_held_to_the_options(kld): pass
            def test_not_gated(): pass
        """,
    )
    result = gate("--kld-max-mean=1")
    failed = {line.split("::")[-1].split("[")[0] for line in result.outlines if line.startswith("FAILED")}
    assert failed == {
        "test_module_mark",
        "test_without_fixture",
        "test_with_fixture",
        "test_class_mark",
        "test_closest_mark_that_names_the_limit_wins",
    }
    result.assert_outcomes(failed=5, passed=3)


def test_class_mark_does_not_reach_other_classes_through_an_inherited_method(gate: Gate) -> None:
    gate.pytester.makepyfile("""
        import pytest

        class Base:
            def test_shared(self, request):
                assert ("_kld_gate" in request.fixturenames) == (type(self).__name__ == "TestMarked")

        @pytest.mark.kld
        class TestMarked(Base): pass

        class TestPlain(Base): pass
    """)
    gate().assert_outcomes(passed=2)


ARGUMENTS = (*LIMITS, *MATRIX_LIMITS, "path", "throughput", *SPEED_LIMITS)


@pytest.mark.parametrize(
    ("mark", "complaint"),
    [
        ("kld(max_maen=0.1)", f"*the kld marker has no argument 'max_maen'; valid are {', '.join(ARGUMENTS)}"),
        ("kld(max_mean='high')", "*kld marker, max_mean: expected a number of at least 0, got 'high'"),
        ("kld(max_mean=-1)", "*kld marker, max_mean: expected a number of at least 0, got -1"),
        ("kld(max_mean=True)", "*kld marker, max_mean: expected a number of at least 0, got True"),
        ("kld(max_nan=0.5)", "*kld marker, max_nan: expected a whole number of at least 0, got 0.5"),
        ("kld(min_top1=2)", "*kld marker, min_top1: expected a number of at least 0 and at most 1, got 2"),
        ("kld(0.1)", f"*the kld marker takes keyword arguments only ({', '.join(ARGUMENTS)}), got 0.1"),
    ],
)
def test_bad_marker_arguments_are_errors_of_the_collection(gate: Gate, mark: str, complaint: str) -> None:
    gate.pytester.makepyfile(f"import pytest\n@pytest.mark.{mark}\nclass TestGate:\n    def test_gate(self): pass")
    result = gate("--collect-only")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["*ERROR collecting*", complaint])


IDLE = {
    "unittest": """
        import unittest, pytest
        @pytest.mark.kld(max_mean=1)
        class TestCase(unittest.TestCase):
            def test_idle(self): pass
    """,
    "parameter set": """
        import pytest
        @pytest.mark.parametrize("x", [1, pytest.param(2, marks=pytest.mark.kld(max_mean=1))])
        def test_idle(x): pass
    """,
}


@pytest.mark.parametrize("source", IDLE.values(), ids=IDLE)
def test_marker_that_would_gate_nothing_is_a_usage_error(gate: Gate, source: str) -> None:
    gate.pytester.makepyfile(source)
    result = gate(candidates=())
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: *test_idle*: the kld marker cannot gate this test.*"])


def test_marker_that_a_hook_adds_is_checked_and_honoured_with_the_fixture_and_refused_without(gate: Gate) -> None:
    gate.pytester.makeconftest("""
        import pytest
        def pytest_collection_modifyitems(config, items):
            for item in items:
                item.add_marker(pytest.mark.kld(**eval(config.getoption("--limits"))), append=False)
        def pytest_addoption(parser):
            parser.addoption("--limits")
    """)
    gate.pytester.makepyfile(test_fixture="def test_fixture(kld): pass", test_plain=UNGATED)
    gate("test_fixture.py", "--limits={'max_mean': 1e-9}").assert_outcomes(failed=1)
    bad = gate("test_fixture.py", "--limits={'mean': 1}")
    bad.stderr.fnmatch_lines(["ERROR: test_fixture.py::test_fixture*: the kld marker has no argument 'mean'; valid*"])
    idle = gate("test_plain.py", "--limits={}", candidates=())
    idle.stderr.fnmatch_lines(["ERROR: test_plain.py::test_ungated: the kld marker cannot gate this test.*"])


def test_builtin_gate_steps_in_only_where_nobody_gates(gate: Gate) -> None:
    gate.pytester.makepyfile(test_plain=UNGATED, test_own="def test_own(kld): pass")
    only = "--collect-only", "-q"
    gate(*only, "test_plain.py").stdout.fnmatch_lines(["test_plain.py::test_ungated", "kld::test_kld[[]*]"])
    gate(*only).stdout.no_fnmatch_line("kld::*")
    # Deselecting a project's own gate does not add the built-in one.
    deselected = gate(*only, "-k", "ungated")
    deselected.stdout.no_fnmatch_line("kld::*")
    deselected.stdout.fnmatch_lines(["test_plain.py::test_ungated", "*1/2 tests collected (1 deselected)*"])


def test_candidates_in_the_ini_file_call_the_builtin_gate_only_where_there_is_no_test(gate: Gate) -> None:
    gate.pytester.makeini(f"[pytest]\nkld_ref = {gate.reference}\nkld_candidate = {gate.candidate}")
    run = gate.pytester.runpytest_inprocess
    run("--collect-only", "-q").stdout.fnmatch_lines(["kld::test_kld[[]*]"])
    gate.pytester.makepyfile(UNGATED)
    run("--collect-only", "-q").stdout.no_fnmatch_line("kld::*")


def test_mark_expression_selects_every_gate(gate: Gate) -> None:
    gate.pytester.makepyfile(test_plain=UNGATED, test_own="def test_own(kld): pass")
    gates = gate("--collect-only", "-q", "-m", "kld")
    gates.stdout.fnmatch_lines(["test_own.py::test_own[[]*]", "*1/2 tests collected (1 deselected)*"])
    gate("--collect-only", "-q", "-m", "not kld").stdout.fnmatch_lines(["test_plain.py::test_ungated"])
    gate("--collect-only", "-q", "-m", "kld", "test_plain.py").stdout.fnmatch_lines(["kld::test_kld[[]*]"])


def test_collecting_computes_nothing_and_leaves_reports_alone(gate: Gate, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text("the last run's")
    result = gate("--collect-only", f"--kld-cache-dir={tmp_path / 'none'}", f"--kld-json={report}")
    result.stdout.fnmatch_lines(["*<BuiltinGate gate_only.py>*", "*1 test collected*"])
    assert not (tmp_path / "none").exists()
    assert report.read_text() == "the last run's"


def test_builtin_gate_ignores_the_projects_naming_rules_and_import_mode(gate: Gate) -> None:
    gate.pytester.makeini("[pytest]\npython_functions = check_*\npython_files = check_*.py")
    gate("--import-mode=importlib").assert_outcomes(passed=1)


@pytest.mark.parametrize("workers", [(), ("-n2",)], ids=["alone", "xdist"])
def test_limit_with_nothing_to_gate_is_an_error_that_says_so(gate: Gate, workers: tuple[str, ...]) -> None:
    gate.pytester.makepyfile(UNGATED)
    result = gate("--kld-max-p99=1", *workers, candidates=())
    assert result.ret == (pytest.ExitCode.TESTS_FAILED if workers else pytest.ExitCode.USAGE_ERROR)
    output = result.stdout if workers else result.stderr
    output.fnmatch_lines(["*--kld-max-p99 is given, but there is nothing to gate: give --kld-ref=MODEL and*"])


def test_candidate_without_a_reference_is_a_usage_error(gate: Gate) -> None:
    result = gate.pytester.runpytest_inprocess(f"--kld-candidate={gate.candidate}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --kld-candidate needs a reference*--kld-ref=MODEL"])


def test_gated_tests_without_models_are_errors_and_not_skips(gate: Gate) -> None:
    gate.pytester.makepyfile("import pytest\n@pytest.mark.kld\ndef test_gate(): pass")
    gate.pytester.runpytest_inprocess(gate.cache).assert_outcomes(errors=1)
    result = gate(candidates=())
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*ModelError: there is no candidate: give --kld-candidate=MODEL,*"])


def test_plugin_can_be_switched_off(gate: Gate) -> None:
    gate.pytester.makepyfile(UNGATED)
    result = gate.pytester.runpytest_inprocess("-p", "no:kld")
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*kld:*")
