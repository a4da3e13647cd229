"""Reports of a session that ended early say so, and name what was planned and not measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import jsonschema
import pytest

if TYPE_CHECKING:
    from conftest import Gate

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "report.schema.json").read_text(encoding="utf-8"))
REPORTS = ("--kld-json=report.json", "--kld-junit=report.xml", "--kld-html=report.html")


def check_reports(gate: Gate, shown: str, reason: str, measured: list[str], missing: list[str]) -> None:
    """Check all four reports against what was measured and what was not, by the ends of node ids."""
    report: dict[str, Any] = json.loads((gate.path / "report.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(SCHEMA).validate(report)
    incomplete = report["incomplete"]
    assert reason in incomplete["reason"]
    assert incomplete["planned"] == len(measured) + len(missing)
    assert sorted(nodeid.partition("::")[2] for nodeid in incomplete["not_measured"]) == sorted(missing)
    results = {result["nodeid"].partition("::")[2]: result for result in report["results"]}
    assert set(results) == {*measured, *missing}
    for name in missing:
        assert (results[name]["outcome"], results[name]["figures"]) == ("error", None)
        assert results[name]["message"].startswith("not measured: the session ended before this test finished")
    assert all(results[name]["figures"] is not None for name in measured)

    section = shown.partition("KLD Evaluation Results")[2]
    (headline,) = [line for line in section.splitlines() if line.startswith("INCOMPLETE: ")]
    assert reason in headline
    assert f"; {len(missing)} of {len(measured) + len(missing)} gated test" in headline
    page = (gate.path / "report.html").read_text(encoding="utf-8")
    (alert,) = [part.partition("</div>")[0] for part in page.split('<div class="incomplete" role="alert">')[1:]]
    assert "<title>KLD report (incomplete): " in page
    for nodeid in incomplete["not_measured"]:
        assert f"  {nodeid}" in section.splitlines()
        assert f"<li><bdi>{nodeid}</bdi></li>" in alert
    errors = [
        case.get("classname")
        for case in ElementTree.parse(gate.path / "report.xml").getroot().iter("testcase")
        if case.get("name") == "measurement" and case.find("error") is not None
    ]
    assert sorted(errors) == sorted(incomplete["not_measured"])


def start(gate: Gate, *arguments: str) -> subprocess.Popen[str]:
    """Start pytest as a shell does, as the leader of a process group."""
    options = [f"--kld-ref={gate.reference}", f"--kld-candidate={gate.candidate}", *gate.protocol, gate.cache]
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *REPORTS, *arguments],
        cwd=gate.path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


THREE = """
import pathlib, time, pytest

def test_first(kld): pass
def test_second(kld):
    pathlib.Path("inside").touch()
    time.sleep(300)
@pytest.mark.kld(max_mean=1)
def test_third(): pass
def test_without_a_gate(): pass
@pytest.mark.skip
def test_skipped(kld): pass
"""


@pytest.mark.parametrize(
    "workers", [pytest.param((), id="alone"), pytest.param(("-n1",), id="xdist", marks=pytest.mark.slow)]
)
def test_interrupt_names_the_test_that_ran_and_those_that_were_to_come(gate: Gate, workers: tuple[str, ...]) -> None:
    gate.pytester.makepyfile(test_three=THREE)
    process = start(gate, *workers)
    try:
        wait_for(gate.path / "inside", process)
        if workers:
            time.sleep(1)  # until the controller has heard of the first test
        os.killpg(process.pid, signal.SIGINT)
        shown, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == pytest.ExitCode.INTERRUPTED
    parameter = f"[{gate.candidate}]"
    missing = [f"test_second{parameter}", f"test_third{parameter}"]
    if workers or "1 skipped" not in shown:
        missing.append(f"test_skipped{parameter}")
    check_reports(gate, shown, "KeyboardInterrupt", [f"test_first{parameter}"], missing)


FAILING = """
import pytest

@pytest.mark.kld(max_mean=1e-9)
def test_first(): pass
@pytest.mark.kld(max_mean=1)
def test_second(): pass
def test_deselected(kld): pass
def test_without_a_gate(): pass
"""


@pytest.mark.parametrize("option", ["-x", "--maxfail=1", "--exitfirst"])
def test_first_failure_ends_the_session_and_the_rest_is_named(gate: Gate, option: str) -> None:
    gate.pytester.makepyfile(test_failing=FAILING)
    result = gate(option, "--deselect=test_failing.py::test_deselected", *REPORTS)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    parameter = f"[{gate.candidate}]"
    check_reports(
        gate,
        result.stdout.str(),
        "stopping after 1 failures",
        [f"test_first{parameter}"],
        [f"test_second{parameter}"],
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "workers", [pytest.param((), id="alone"), pytest.param(("-n1",), id="xdist", marks=pytest.mark.slow)]
)
def test_own_candidates_that_were_not_reached_are_named(gate: Gate, workers: tuple[str, ...]) -> None:
    gate.pytester.makepyfile(
        test_own=f"""
        import pytest
        own = pytest.mark.parametrize("kld_candidate", [{str(gate.candidate)!r}], ids=["own"], indirect=True)

        @own
        @pytest.mark.kld(max_mean=1e-9)
        def test_first(): pass
        @own
        def test_second(kld): pass
        @own
        def test_third(kld): pass
        """
    )
    result = gate("-x", *workers, *REPORTS, candidates=(), subprocess=True)
    assert result.ret != pytest.ExitCode.OK
    results = {each["nodeid"].partition("::")[2]: each for each in gate.results()}
    assert {each["candidate"] for each in results.values()} == {str(gate.candidate)}
    missing = [name for name, each in results.items() if each["figures"] is None]
    assert "test_third[own]" in missing
    measured = [name for name in results if name not in missing]
    check_reports(gate, result.stdout.str(), "stopping after 1 failures", measured, missing)


def test_exit_from_a_test_is_the_reason(gate: Gate) -> None:
    gate.pytester.makepyfile(
        test_exit="""
        import pytest
        def test_first(kld): pass
        def test_second(kld): pytest.exit("no more \\x1b[31mGPUs")
        """
    )
    result = gate(*REPORTS)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    parameter = f"[{gate.candidate}]"
    text = (gate.path / "report.html").read_text() + (gate.path / "report.xml").read_text()
    assert r"no more \x1b[31mGPUs" in text
    assert "\x1b" not in text
    check_reports(gate, result.stdout.str(), "no more ", [f"test_first{parameter}"], [f"test_second{parameter}"])


def test_collection_that_fails_leaves_every_gate_unmeasured(gate: Gate) -> None:
    gate.pytester.makepyfile(test_broken="import nothing_of_that_name", test_fine="def test_fine(kld): pass")
    result = gate(*REPORTS)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    check_reports(gate, result.stdout.str(), "1 error during collection", [], [f"test_fine[{gate.candidate}]"])


def test_crashed_worker_loses_no_result_of_a_test_with_its_own_candidates(gate: Gate) -> None:
    gate.pytester.makepyfile(
        test_own=f"""
        import os, pytest
        @pytest.mark.parametrize("kld_candidate", [{str(gate.candidate)!r}], ids=["own"], indirect=True)
        def test_crash(kld): os._exit(1)
        """
    )
    gate("-n1", "--kld-json=report.json", candidates=(), subprocess=True)
    (result,) = gate.results()
    assert (result["outcome"], result["candidate"]) == ("error", str(gate.candidate))
    assert "crashed" in result["message"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "workers", [pytest.param((), id="alone"), pytest.param(("-n1",), id="xdist", marks=pytest.mark.slow)]
)
def test_whole_session_is_not_incomplete(gate: Gate, workers: tuple[str, ...]) -> None:
    gate.pytester.makepyfile(
        test_whole="""
        import pytest
        def test_gate(kld): pass
        @pytest.mark.skip
        def test_skipped(kld): pass
        def test_skips_itself(kld): pytest.skip()
        @pytest.mark.xfail(run=False)
        def test_not_run(kld): pass
        def test_error(kld, no_such_fixture): pass
    """
    )
    result = gate(*workers, *REPORTS, subprocess=True)
    assert json.loads((gate.path / "report.json").read_text())["incomplete"] is None
    page = (gate.path / "report.html").read_text()
    assert ("<title>KLD report: " in page, 'class="incomplete"' in page) == (True, False)
    result.stdout.no_fnmatch_line("*INCOMPLETE*")
