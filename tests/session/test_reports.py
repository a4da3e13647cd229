"""Report files: where they may be written, and that a failure to write one does not affect the others."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest

from pytest_kld.errors import ReportError
from pytest_kld.files import write_report

if TYPE_CHECKING:
    from conftest import Gate

REPORTS = ("junit", "json", "html", "markdown")


@pytest.fixture
def odd_dir(tmp_path: Path) -> Path:
    """A directory whose name is not UTF-8."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/odd\xff"))
    path.mkdir()
    return path


def run(gate: Gate, *arguments: str, candidate: Path | None = None) -> subprocess.CompletedProcess[bytes]:
    """Gate in a separate process; its output is returned unchanged, in bytes."""
    options = [f"--kld-ref={gate.reference}", f"--kld-candidate={candidate or gate.candidate}", *gate.protocol]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, gate.cache, *arguments],
        cwd=gate.path,
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONUTF8": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )


@pytest.mark.parametrize("option", REPORTS)
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_special_file_is_refused_at_the_start_and_stays(gate: Gate, tmp_path: Path, option: str, kind: str) -> None:
    path = tmp_path / "special"
    if kind == "pipe":
        os.mkfifo(path)
    elif os.geteuid() == 0:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    else:
        pytest.skip("only root makes devices")
    before = path.lstat()
    (tmp_path / "link").symlink_to(path)
    for named in (path, tmp_path / "link"):
        result = gate(f"--kld-{option}={named}")
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines([f"ERROR: --kld-{option}: expected a file that can be written*not a regular file"])
    assert path.lstat() == before


def test_standard_output_through_a_pipe_is_refused(gate: Gate) -> None:
    ran = run(gate, "--kld-json=/dev/stdout")
    assert ran.returncode == pytest.ExitCode.USAGE_ERROR
    assert b"ERROR: --kld-json: expected a file that can be written, got '/dev/stdout'" in ran.stderr


@pytest.mark.parametrize("option", REPORTS)
def test_special_file_that_appears_during_the_session_stays_and_fails_it(gate: Gate, option: str) -> None:
    gate.pytester.makepyfile("""
        import os
        def test_gate(kld): os.mkfifo("report")
    """)
    others = [f"--kld-{name}=other.{name}" for name in REPORTS if name != option]
    result = gate(f"--kld-{option}=report", *others)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["ERROR: cannot write the * report *: * is a pipe and not a regular file; *"])
    result.stdout.fnmatch_lines(["KLD Evaluation Results*"])
    assert stat.S_ISFIFO((gate.path / "report").lstat().st_mode)
    assert len(list(gate.path.glob("other.*"))) == len(others)


@pytest.mark.parametrize("kind", ["a pipe", "a symbolic link", "a directory"])
def test_anything_but_a_regular_file_is_refused_when_it_is_written(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "report"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a directory":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "target")
    before = path.lstat()
    with pytest.raises(ReportError, match=f"report is {kind} and not a regular file"):
        write_report(path, b"contents")
    assert path.lstat() == before
    assert list(tmp_path.iterdir()) == [path]


def test_link_to_a_regular_file_is_written_through(gate: Gate, tmp_path: Path) -> None:
    (tmp_path / "target.json").write_text("old")
    (tmp_path / "link.json").symlink_to("target.json")
    gate(f"--kld-json={tmp_path / 'link.json'}").assert_outcomes(passed=1)
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "target.json").read_text())["results"]


@pytest.mark.parametrize("spelling", ["same", "dots", "link to the file", "link to the folder", "hard link"])
def test_two_reports_at_one_path_are_a_usage_error(gate: Gate, tmp_path: Path, spelling: str) -> None:
    one = tmp_path / "here" / "report"
    one.parent.mkdir()
    other = {
        "same": one,
        "dots": tmp_path / "here" / ".." / "here" / "report",
        "link to the file": tmp_path / "link",
        "link to the folder": tmp_path / "folder" / "report",
        "hard link": tmp_path / "hard",
    }[spelling]
    (tmp_path / "link").symlink_to(one)
    (tmp_path / "folder").symlink_to(one.parent)
    if spelling == "hard link":
        one.write_text("old")
        other.hardlink_to(one)
    for names in (("junit", "json"), ("json", "html"), ("junit", "html")):
        result = gate(*(f"--kld-{name}={path}" for name, path in zip(names, (one, other), strict=True)))
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines([f"ERROR: --kld-{names[1]}: --kld-{names[0]} writes its report to *, too; *"])


def test_report_in_the_place_of_pytests_own_is_a_usage_error(gate: Gate) -> None:
    result = gate("--junitxml=out.xml", f"--kld-junit={gate.path / 'out.xml'}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --kld-junit: --junitxml writes its report to *out.xml, too; *"])


@pytest.mark.parametrize("text", ["x" * 250, "y" * 5000, "loop/report"])
def test_path_that_no_file_can_have_is_a_usage_error(gate: Gate, text: str) -> None:
    (gate.path / "loop").symlink_to("loop")
    result = gate(f"--kld-json={text}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --kld-json: *"])
    assert "Traceback" not in result.stderr.str()


@pytest.mark.parametrize("option", ["ref", "candidate", "tokenizer", "cache-dir", "capture-dir"])
def test_path_that_safetensors_cannot_open_is_a_usage_error(gate: Gate, odd_dir: Path, option: str) -> None:
    (odd_dir / "config.json").write_text("{}")
    ran = run(gate, f"--kld-{option}={odd_dir}")
    assert ran.returncode == pytest.ExitCode.USAGE_ERROR
    shown = ran.stderr.decode()  # fails on a raw \xff
    assert re.search(rf"ERROR: --kld-{option}: '?{odd_dir.parent}/odd\\udcff'? is not (valid )?UTF-8", shown)


def test_link_to_a_model_that_safetensors_cannot_open_is_a_usage_error(gate: Gate, odd_dir: Path) -> None:
    (odd_dir / "config.json").write_text("{}")
    (odd_dir.parent / "link").symlink_to(odd_dir)
    ran = run(gate, f"--kld-candidate={odd_dir.parent / 'link'}")
    assert ran.returncode == pytest.ExitCode.USAGE_ERROR
    assert rf"ERROR: --kld-candidate: {odd_dir.parent}/odd\udcff is not UTF-8" in ran.stderr.decode()


@pytest.mark.slow
def test_model_and_test_whose_paths_are_not_utf8_are_reported_everywhere(gate: Gate, odd_dir: Path) -> None:
    shutil.copytree(gate.candidate, odd_dir / "model")
    tests = Path(os.fsdecode(os.fsencode(gate.path) + b"/tests\xff"))
    tests.mkdir()
    (tests / "test_odd.py").write_text(f"""
import os, pytest
@pytest.mark.parametrize("kld_candidate", [os.fsdecode({os.fsencode(odd_dir / "model")!r}), {str(gate.candidate)!r}],
                         ids=["odd", "good"], indirect=True)
def test_gate(kld): pass
""")
    options = [f"--kld-{name}=report.{name}" for name in REPORTS]
    options += ["--kld-max-mean=1", "--kld-cache-dir=cache", "-p", "no:cacheprovider"]  # pytest's cache needs UTF-8
    ran = run(gate, ".", *options)
    assert ran.returncode == pytest.ExitCode.TESTS_FAILED
    assert b"INTERNALERROR" not in ran.stdout
    table = ran.stdout.partition(b"KLD Evaluation Results")[2].partition(b"= short test summary")[0].decode()
    assert r"/odd\udcff/model " in table
    assert [line for line in table.splitlines() if line.startswith(f"{gate.candidate} ") and " pass " in line]
    results = {result["nodeid"]: result for result in gate.results("report.json")}
    name = r"tests\udcff/test_odd.py::test_gate"
    assert results[f"{name}[odd]"]["candidate"] == rf"{odd_dir.parent}/odd\udcff/model"
    assert [results[f"{name}[{each}]"]["outcome"] for each in ("odd", "good")] == ["error", "passed"]
    suites = ElementTree.parse(gate.path / "report.junit").getroot()
    assert rf"{odd_dir.parent}/odd\udcff/model" in [suite.get("name") for suite in suites]
    assert f"{name}[odd]" in [case.get("classname") for case in suites.iter("testcase")]
    page = (gate.path / "report.html").read_text(encoding="utf-8")
    assert rf"{odd_dir.parent}/odd\udcff/model" in page
    assert f"{name}[odd]" in page


@pytest.mark.slow
def test_reports_and_text_in_a_directory_whose_name_is_not_utf8(gate: Gate, odd_dir: Path) -> None:
    shutil.copy(gate.protocol[0].partition("=")[2], odd_dir / "text.txt")
    named = [f"--kld-{name}={odd_dir / name}" for name in REPORTS]
    ran = run(gate, *named, f"--kld-dataset={odd_dir / 'text.txt'}")
    shown = ran.stdout.decode()
    assert ran.returncode == 0, shown
    assert rf"JSON report: {odd_dir.parent}/odd\udcff/json" in shown
    (result,) = json.loads((odd_dir / "json").read_text(encoding="utf-8"))["results"]
    assert result["about"]["protocol"]["dataset"].endswith(rf"{odd_dir.parent}/odd\udcff/text.txt")
    ElementTree.parse(odd_dir / "junit")
    assert (odd_dir / "html").read_text(encoding="utf-8").count(r"/odd\udcff/text.txt") >= 2


BREAK = """
    def pytest_configure():
        import pytest_kld.report.{module} as module
        def broken(*args): raise ZeroDivisionError("broken on purpose")
        module.{function} = broken
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "function", "name"),
    [("junit", "_suite", "JUnit"), ("json_file", "_described", "JSON"), ("html", "view", "HTML")],
)
def test_fault_of_one_report_takes_no_other_and_fails_the_session(
    gate: Gate, module: str, function: str, name: str
) -> None:
    gate.pytester.makeconftest(BREAK.format(module=module, function=function))
    reports = {"JUnit": "a.xml", "JSON": "a.json", "HTML": "a.html"}
    result = gate("--kld-junit=a.xml", "--kld-json=a.json", "--kld-html=a.html", "--kld-max-mean=1", subprocess=True)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    text = result.stdout.str()
    assert f"ERROR: cannot write the {name} report {gate.path / reports.pop(name)}: ZeroDivisionError: broken" in text
    assert "KLD Evaluation Results" in text
    for other, path in reports.items():
        assert f"{other} report: {gate.path / path}" in text
        assert (gate.path / path).stat().st_size > 0
    assert "INTERNALERROR" not in text


@pytest.mark.slow
def test_fault_of_the_table_leaves_the_reports_and_fails_the_session(gate: Gate) -> None:
    gate.pytester.makeconftest(BREAK.format(module="terminal", function="table"))
    result = gate("--kld-json=a.json", subprocess=True)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["ERROR: cannot show the table: ZeroDivisionError: broken*", "JSON report: *"])
    assert gate.results("a.json")[0]["outcome"] == "passed"
