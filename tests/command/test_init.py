"""`pytest-kld init`: the files to start from are right as they are written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from pytest_kld.command import main

if TYPE_CHECKING:
    from conftest import Gate


def test_the_suite_gates_the_models_that_were_named(gate: Gate, broken_dir: Path) -> None:
    models = [f"--ref={gate.reference}", f"--candidate={gate.candidate}", f"--candidate={broken_dir}"]
    assert main(["init", *models, "--max-mean", "0.1", "--ci", "none"]) == 0
    suite = gate.path / "release.kld.toml"
    assert [path.name for path in gate.path.iterdir()] == [suite.name]
    text = suite.read_text()
    for written, small in (
        ('"wikitext-2"', '"python-docs"'),
        ("windows = 100", "windows = 3"),
        ("window_size = 2048", "window_size = 64"),
        ("stride = 512", "stride = 32"),
    ):
        assert written in text
        text = text.replace(written, small)
    suite.write_text(text)
    run = gate.pytester.runpytest_inprocess(suite.name, gate.cache)
    run.assert_outcomes(passed=1, failed=1)


def test_the_suite_of_no_models_is_collected_as_it_is(gate: Gate) -> None:
    assert main(["init"]) == 0
    run = gate.pytester.runpytest_inprocess("release.kld.toml", "--collect-only", "-q")
    run.stdout.fnmatch_lines(["release.kld.toml::*ORG/CANDIDATE*"])


@pytest.mark.parametrize(
    ("ci", "name", "steps"),
    [
        (
            "github",
            ".github/workflows/kld.yml",
            lambda flow: [step.get("run") for step in flow["jobs"]["gate"]["steps"]],
        ),
        ("gitlab", ".gitlab-ci.yml", lambda flow: flow["kld"]["script"]),
    ],
)
def test_the_workflow_runs_the_suite(ci: str, name: str, steps: object, tmp_path: Path) -> None:
    assert callable(steps)
    assert main(["init", str(tmp_path / "new"), "--ci", ci]) == 0
    workflow = yaml.safe_load((tmp_path / "new" / name).read_text())
    assert any("pytest release.kld.toml --kld-json=kld.json" in (run or "") for run in steps(workflow))


def test_files_that_are_there_are_replaced_only_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "release.kld.toml").write_text("mine")
    assert main(["init", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "release.kld.toml").read_text() == "mine"
    assert not (tmp_path / ".github").exists()
    assert main(["init", str(tmp_path), "--force"]) == 0
    assert "[[candidate]]" in (tmp_path / "release.kld.toml").read_text()


def test_a_limit_that_is_none_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", str(tmp_path), "--max-mean", "x"]) == 2
    assert "expected a number" in capsys.readouterr().err
