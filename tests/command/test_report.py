"""`pytest-kld report` and `compare`: the reports of a session again, merged, and from scores."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from made import error_result, made_result, made_speed

from pytest_kld.command import main
from pytest_kld.gate.result import Incomplete
from pytest_kld.report.json_file import read_json_report, write_json_report
from pytest_kld.report.terminal import table
from pytest_kld.subjects.subject import Subject

if TYPE_CHECKING:
    from conftest import Gate

    from pytest_kld.gate.result import GateResult


def saved(path: Path, *results: GateResult, incomplete: Incomplete | None = None) -> str:
    write_json_report(path, results, incomplete)
    return str(path)


def unsaved(value: Any) -> Any:
    """Leave out under which name the cache has the scores."""
    return {**value, "scores": None} if isinstance(value, dict) and "scores" in value else value


def test_a_report_that_is_read_describes_the_same_results(tmp_path: Path) -> None:
    infinite = made_result("b", confidence=0.95)
    assert infinite.figures is not None
    figures = {**infinite.figures, "max": float("inf"), "flips": None}
    speed = {"candidate": made_speed({1: [5.0, float("inf")]}), "base": None, "base_label": "nan", "checks": []}
    axes = Subject(name="a", axes={"z": "nan", "b": "inf"})
    results = [made_result(axes, speed=speed), replace(infinite, figures=figures), error_result("c", xfail=True)]
    read = read_json_report(Path(saved(tmp_path / "report.json", *results)))
    assert json.dumps([result.to_json() for result in read.results]) == json.dumps([r.to_json() for r in results])
    assert table(read.results) == table(results)


def test_all_reports_of_a_session_come_out_of_its_json_report(
    gate: Gate, broken_dir: Path, unloadable_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = (gate.candidate, broken_dir, unloadable_dir)
    names = ("--kld-json=first.json", "--kld-html=first.html", "--kld-junit=first.xml")
    run = gate("--kld-max-mean=0.1", *names, candidates=models)
    run.assert_outcomes(passed=1, failed=1, errors=1)
    capsys.readouterr()
    written = [argument for kind in ("json", "html") for argument in (f"--{kind}", f"again.{kind}")]
    assert main(["report", "first.json", *written, "--junit", "again.xml"]) == 1
    shown = capsys.readouterr().out.splitlines()
    lines = run.outlines
    start = next(index for index, line in enumerate(lines) if line.startswith("KLD Evaluation Results"))
    assert shown[:6] == lines[start : start + 6]
    first, again = (json.loads((gate.path / f"{name}.json").read_text())["results"] for name in ("first", "again"))
    assert first == again
    assert (gate.path / "first.xml").read_text() == (gate.path / "again.xml").read_text()
    first, again = (
        re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "", (gate.path / f"{name}.html").read_text())
        for name in ("first", "again")
    )
    assert '"histogram"' in first
    assert first == again


def test_shards_merge_into_the_report_of_the_whole_run(gate: Gate, broken_dir: Path) -> None:
    gate("--kld-max-mean=0.1", "--kld-json=whole.json", candidates=(gate.candidate, broken_dir))
    gate("--kld-max-mean=0.1", "--kld-json=shard-1.json", candidates=(gate.candidate,))
    gate("--kld-max-mean=0.1", "--kld-json=shard-2.json", candidates=(broken_dir,))
    assert main(["report", "shard-1.json", "shard-2.json", "--json", "merged.json"]) == 1

    def results(name: str) -> list[dict[str, Any]]:
        return [{**result, "seconds": 0} for result in gate.results(name)]

    assert results("merged.json") == results("whole.json")


def test_a_test_in_two_reports_is_refused_unless_the_latest_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "1.json", tmp_path / "2.json"
    saved(first, error_result("a"))
    saved(second, made_result("a"))
    second.write_text(re.sub('"created": ".*?"', '"created": "2999-01-01T00:00:00+00:00"', second.read_text()))
    assert main(["report", str(first), str(second)]) == 2
    assert "both hold kld::test_kld[a]" in capsys.readouterr().err
    assert main(["report", str(second), str(first), "--latest"]) == 0


def test_what_a_shard_did_not_measure_stays_missing_in_the_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = Incomplete(reason="interrupted", planned=2, not_measured=("kld::test_kld[b]",))
    shards = [
        saved(tmp_path / "1.json", made_result("a"), error_result("b"), incomplete=lost),
        saved(tmp_path / "2.json", made_result("c")),
    ]
    assert main(["report", *shards, "--json", str(tmp_path / "all.json")]) == 1
    out = capsys.readouterr().out
    assert "the session ended early (interrupted); 1 of 3 gated tests was not measured" in out
    merged = read_json_report(tmp_path / "all.json")
    assert merged.incomplete == Incomplete(reason="interrupted", planned=3, not_measured=("kld::test_kld[b]",))


def test_results_of_two_protocols_are_not_put_into_one_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = [saved(tmp_path / "1.json", made_result("a")), saved(tmp_path / "2.json", made_result("b", size=64))]
    assert main(["report", *reports]) == 0
    assert capsys.readouterr().out.count("KLD Evaluation Results") == 2
    assert main(["report", *reports, "--html", str(tmp_path / "report.html")]) == 2
    assert "show one reference and one protocol" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda report: report.update(schema_version=1), "has schema_version 1"),
        (lambda report: report["results"][0].pop("outcome"), "is damaged"),
        (lambda report: report["results"][0].update(outcome="good"), "has the outcome 'good'"),
        (lambda report: report["results"][0]["figures"].pop("p99"), "has other figures"),
        (lambda report: report["results"][0].update(candidate="other"), "candidate of kld::test_kld[a] contradicts"),
        (lambda report: report["results"][0].update(figures="none"), "is damaged"),
        (lambda report: report.clear(), "is not a JSON report"),
    ],
)
def test_a_damaged_report_is_refused(
    tmp_path: Path, damage: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"
    saved(path, made_result("a"))
    report = json.loads(path.read_text())
    damage(report)
    path.write_text(json.dumps(report))
    assert main(["report", str(path)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert str(path) in error


def test_scores_are_judged_by_the_limits_that_are_given(
    gate: Gate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gate.cache = f"--kld-cache-dir={tmp_path / 'cache'}"  # scores name the captures that were there first
    gate("--kld-max-mean=1", "--kld-json=session.json").assert_outcomes(passed=1)
    (scores,) = (tmp_path / "cache" / "scores").glob("*.safetensors")
    assert main(["report", str(scores), "--limit", "max-mean=1", "--json", "again.json"]) == 0
    (session,), (again,) = (gate.results(name) for name in ("session.json", "again.json"))
    for name in ("figures", "datasets", "checks", "about", "band", "profile"):
        assert unsaved(again[name]) == unsaved(session[name]), name
    assert (again["candidate"], again["outcome"]) == (session["candidate"], "passed")
    assert main(["report", str(scores), "--limit", "max_mean=1e-9"]) == 1
    assert "max_mean 1e-09" in capsys.readouterr().out
    assert main(["report", str(scores), "session.json", "--limit", "max_mean=1"]) == 2
    assert "apply to scores" in capsys.readouterr().err
    assert main(["report", str(scores), "--limit", "max_men=1"]) == 2
    assert "max_median" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["start", "spread"])
def test_compare_gives_the_figures_of_the_gate(
    gate: Gate, tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    cache = f"--kld-cache-dir={tmp_path}"
    gate("--kld-max-mean=1", "--kld-json=session.json", cache, f"--kld-windows-from={part}").assert_outcomes(passed=1)
    manifests = list(tmp_path.glob("captures/*/capture.json"))
    by_model = {json.loads(path.read_text())["model"]: str(path.parent) for path in manifests}
    pair = [by_model[str(gate.reference)], by_model[str(gate.candidate)]]
    capsys.readouterr()
    assert main(["compare", *pair, "--scores", "pair.safetensors", "--json", "-"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    (session,) = gate.results("session.json")
    assert result["figures"] == session["figures"]
    assert unsaved(result["about"]) == unsaved(session["about"])
    places = [[one["source_position"] for one in each["diagnosis"]["worst_positions"]] for each in (result, session)]
    assert places[0] == places[1]
    assert main(["report", "pair.safetensors"]) == 0
    assert str(gate.candidate) in capsys.readouterr().out
    assert main(["compare", *pair, "--limit", "max_mean=1e-9"]) == 1


def test_compare_refuses_a_damaged_capture(gate: Gate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gate("--kld-max-mean=1", f"--kld-cache-dir={tmp_path / 'cache'}").assert_outcomes(passed=1)
    capture = next((tmp_path / "cache").glob("captures/*/capture.json")).parent
    copy = shutil.copytree(capture, tmp_path / "copy")
    window = copy / "windows" / "00000.safetensors"
    *before, last = window.read_bytes()
    window.write_bytes(bytes([*before, last ^ 1]))
    assert main(["compare", str(capture), str(copy)]) == 2
    assert "00000.safetensors is corrupt" in capsys.readouterr().err
