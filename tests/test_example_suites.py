"""The suites among the examples: two as a team would write them, and one that runs here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_kld.collecting.items import is_gated, is_matrix
from pytest_kld.settings.subjects import candidate_of

EXAMPLES = Path(__file__).parent.parent / "conftest_examples"


def test_suites_name_the_rows_of_the_published_tables(pytester: pytest.Pytester) -> None:
    for path in (EXAMPLES / "release_suite" / "release.kld.toml", EXAMPLES / "moe_suite" / "moe.kld.toml"):
        shutil.copy(path, pytester.path)
    items = pytester.inline_genitems("--strict-markers")[0]
    (matrix,) = (item for item in items if is_matrix(item))
    assert matrix.name == "test_kld_matrix[lukealonso/NVFP4]"
    subjects = [candidate_of(item) for item in items if is_gated(item)]
    assert [subject.label for subject in subjects if subject.axes] == [
        "lukealonso/NVFP4 (flashinfer_cutlass (fp4 + moe))",
        "lukealonso/NVFP4 (cutedsl + cudnn (moe cutedsl, fp4 cudnn))",
        "lukealonso/NVFP4 (cutlass MoE)",
    ]
    assert [subject.name for subject in subjects if not subject.axes] == [
        "QuantTrio/Qwen3.5-397B-A17B-AWQ (INT4)",
        "nvidia/Qwen3.5-397B-A17B-NVFP4",
        "lukealonso/Qwen3.5-397B-A17B-NVFP4",
        "Sehyo/Qwen3.5-397B-A17B-NVFP4",
    ]


@pytest.mark.slow
def test_the_suite_of_the_real_model_gives_the_figures_of_the_command_line(quickstart: tuple[Path, str]) -> None:
    directory, _ = quickstart
    shutil.copy(EXAMPLES / "small_suite" / "smollm2.kld.toml", directory.parent)
    command = [sys.executable, "-m", "pytest", "smollm2.kld.toml", "-p", "no:cacheprovider", "--strict-markers"]
    command += ["--kld-cache-dir=quickstart/cache", "--kld-json=suite.json"]
    run = subprocess.run(command, cwd=directory.parent, capture_output=True, text=True, check=False)
    assert run.returncode == pytest.ExitCode.OK, run.stdout
    known = json.loads((directory / "report.json").read_text())["results"]
    alone = {Path(row["candidate"]).name: row["figures"]["mean"] for row in known}
    report = json.loads((directory.parent / "suite.json").read_text())
    rows = {row["candidate"]: row for row in report["results"]}
    assert list(rows) == ["int8 (eager)", "int8 (sdpa)", "fp8", "nvfp4"]
    assert [(row["outcome"], row["xfail"]) for row in rows.values()] == [("passed", False)] * 3 + [("failed", True)]
    assert (rows["fp8"]["figures"]["mean"], rows["nvfp4"]["figures"]["mean"]) == (alone["fp8"], alone["nvfp4"])
    for backend in ("eager", "sdpa"):
        assert rows[f"int8 ({backend})"]["figures"]["mean"] == pytest.approx(alone["int8"], rel=1e-3)
    (matrix,) = report["matrices"]
    assert (matrix["members"], matrix["outcome"]) == (["int8 (eager)", "int8 (sdpa)"], "passed")
    (pair,) = matrix["pairs"]
    means = [rows[label]["figures"]["mean"] for label in matrix["members"]]
    assert pair["difference"] == pytest.approx(means[0] - means[1], rel=1e-6)
    assert 0 < pair["forth"]["mean"] < means[0]
    assert pair["difference_interval"]["low"] <= pair["difference"] <= pair["difference_interval"]["high"]
