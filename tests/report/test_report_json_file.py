"""The JSON report keeps to its schema, and the schema describes all of it."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

from pytest_kld.errors import ReportError
from pytest_kld.figures.between import Between, Direction
from pytest_kld.figures.scores import Summary
from pytest_kld.gate.limits import LIMITS
from pytest_kld.gate.matrix import MatrixResult
from pytest_kld.gate.result import GateResult, checks_of
from pytest_kld.gate.verdict import BANDS, judge
from pytest_kld.report.json_file import SCHEMA_VERSION, read_json_report, write_json_report
from pytest_kld.subjects.subject import Subject

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Gate

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "report.schema.json").read_text(encoding="utf-8"))
RESULT = SCHEMA["$defs"]["result"]


def validate(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(SCHEMA, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER).validate(
        report
    )
    return report


def branches(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a schema and every schema within it."""
    yield schema
    for key in ("properties", "$defs"):
        for part in schema.get(key, {}).values():
            yield from branches(part)
    for key in ("anyOf", "oneOf"):
        for part in schema.get(key, []):
            yield from branches(part)
    if "items" in schema:
        yield from branches(schema["items"])


def test_schema_is_valid_and_of_the_version_that_is_written() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["properties"]["schema_version"]["const"] == SCHEMA_VERSION


def test_every_field_is_described_and_none_is_left_open_by_mistake() -> None:
    open_objects = set()
    for schema in branches(SCHEMA):
        for name, field in schema.get("properties", {}).items():
            assert field.get("description"), f"{name} has no description"
            if field.get("type") == "object" and field.get("additionalProperties") is not False:
                open_objects.add(name)
        if "properties" in schema and schema["additionalProperties"] is False:
            assert schema["required"] == list(schema["properties"])
    assert open_objects == {
        *("engine", "versions", "datasets", "intervals", "arguments", "environment", "axes", "limits", "elsewhere"),
        *("figures", "gauges", "speed", "gaps"),
        *("token_classes", "scripts", "backends"),
    }


def test_schema_describes_every_figure_every_limit_and_every_field_of_a_result() -> None:
    assert sorted(SCHEMA["$defs"]["figures"]["properties"]) == sorted(field.name for field in fields(Summary))
    known = {field.name for field in fields(GateResult)}
    assert sorted(RESULT["properties"]) == sorted([*known, "subjects", "band", "notes"])
    of_matrix = {field.name for field in fields(MatrixResult)}
    assert sorted(SCHEMA["$defs"]["matrix"]["properties"]) == sorted([*of_matrix, "subjects"])
    of_pair = {field.name for field in fields(Between)}
    assert sorted(SCHEMA["$defs"]["pair"]["properties"]) == sorted([*of_pair, "first", "second", "checks", "floor"])
    assert list(SCHEMA["$defs"]["direction"]["properties"]) == [field.name for field in fields(Direction)]
    check = SCHEMA["$defs"]["check"]["properties"]
    assert check["limit"]["enum"] == list(LIMITS)
    assert check["figure"]["enum"] == [limit.figure for limit in LIMITS.values()]
    (bands,) = (part["enum"] for part in RESULT["properties"]["band"]["anyOf"] if "enum" in part)
    assert bands == [word for _, word in BANDS]


def test_reports_of_all_three_outcomes_keep_to_the_schema(gate: Gate, broken_dir: Path, unloadable_dir: Path) -> None:
    gate.cache = f"--kld-cache-dir={gate.path / 'cache'}"  # the shared one may hold a capture of a copy
    gate("--kld-max-mean=0.1", "--kld-json=report.json", candidates=(gate.candidate, broken_dir, unloadable_dir))
    report = validate(gate.path / "report.json")
    assert [result["outcome"] for result in report["results"]] == ["passed", "failed", "error"]
    passed, _, error = report["results"]
    assert passed["about"]["protocol"]["windows"] == 3
    assert passed["about"]["candidate"]["model"] == str(gate.candidate)
    assert (error["figures"], error["about"], error["band"]) == (None, None, None)


def test_reports_with_matrices_keep_to_the_schema_and_come_back(gate: Gate, broken_dir: Path) -> None:
    both = ("--kld-dataset=python-docs", "--kld-each-dataset")
    options = ("--kld-matrix=all", "--kld-max-between=0.1", "--kld-confidence=0.9", "--kld-json=report.json")
    gate(*options, *both, candidates=(gate.candidate, broken_dir)).assert_outcomes(failed=1, passed=2)
    report = validate(gate.path / "report.json")
    (pair,) = report["matrices"][0]["pairs"]
    assert list(pair["datasets"]) == [check["dataset"] for check in pair["checks"]][1:]
    read = read_json_report(gate.path / "report.json")
    write_json_report(gate.path / "again.json", read.results, read.incomplete, read.shard, read.matrices)
    assert validate(gate.path / "again.json")["matrices"] == report["matrices"]
    damaged = json.loads((gate.path / "report.json").read_text())
    damaged["matrices"][0]["pairs"][0]["first"] = "another"
    (gate.path / "report.json").write_text(json.dumps(damaged))
    with pytest.raises(ReportError, match="contradicts itself"):
        read_json_report(gate.path / "report.json")


@pytest.mark.parametrize("store", ["logits", "logprobs"])
def test_reports_of_the_other_stores_keep_to_the_schema(gate: Gate, store: str) -> None:
    gate(f"--kld-store={store}", "--kld-json=report.json").assert_outcomes(passed=1)
    (result,) = validate(gate.path / "report.json")["results"]
    assert result["about"]["candidate"]["store"] == store


def test_report_of_a_capture_in_the_original_layout_keeps_to_the_schema(gate: Gate, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    gate("--kld-store=logprobs", f"--kld-cache-dir={cache}").assert_outcomes(passed=1)
    captures = {json.loads(path.read_text())["model"]: path for path in cache.glob("captures/*/capture.json")}
    manifest = captures[str(gate.candidate)]
    original = manifest.parent.rename(tmp_path / "original")
    (original / "capture.json").unlink()
    gate("--kld-store=logprobs", "--kld-json=report.json", candidates=(original,)).assert_outcomes(passed=1)
    (result,) = validate(gate.path / "report.json")["results"]
    assert result["about"]["candidate"]["key"] is None


def test_report_of_a_session_that_gated_nothing_is_empty(gate: Gate) -> None:
    gate.pytester.makepyfile("def test_plain(): pass")
    (gate.path / "report.json").write_text("old")
    gate.pytester.runpytest_inprocess("--kld-json=report.json")
    assert validate(gate.path / "report.json")["results"] == []


def test_numbers_that_json_lacks_are_strings(tmp_path: Path) -> None:
    figures = dict.fromkeys((field.name for field in fields(Summary)), 0.5) | dict.fromkeys(
        ("positions", "skipped", "reference_nan_count", "candidate_nan_count", "infinite_count"), 1
    )
    (check,) = checks_of(judge({"max": math.inf}, {"max_max": 1.0}))
    result = GateResult(
        nodeid="n",
        reference=Subject(name="A"),
        candidate=Subject(name="B"),
        outcome="failed",
        checks=(check,),
        figures={**figures, "max": math.inf, "rms_delta_p": math.nan},
    )
    write_json_report(tmp_path / "report.json", [result])
    (written,) = validate(tmp_path / "report.json")["results"]
    assert (written["figures"]["max"], written["figures"]["rms_delta_p"]) == ("inf", "nan")
    assert written["checks"][0]["value"] == "inf"
