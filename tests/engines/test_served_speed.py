"""The speed of a real model on every engine's real server: forms and verdicts, never values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cpu_environment import ServerEnvironment
from served import gate

from pytest_kld.throughput.figures import FIGURES

pytestmark = pytest.mark.slow

CONCURRENCIES = (1, 2, 4)


def test_speed_is_measured_beside_quality_and_has_a_verdict_of_its_own(
    tmp_path: Path, engine: ServerEnvironment, real_models: Path
) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    run, (result,) = gate(
        tmp_path,
        *(f"--kld-ref={real_models / 'smollm2-135m'}", f"--kld-candidate={real_models / 'int8'}"),
        *("--kld-max-mean=0.05", "--kld-dataset=python-docs", "--kld-windows=1", "--kld-window-size=64"),
        *(f"--kld-cache-dir={tmp_path / 'cache'}", *engine.options()),
        *("--kld-throughput=1,2,4", "--kld-throughput-input=16", "--kld-throughput-output=4"),
        *("--kld-throughput-rounds=1", "--kld-min-output-tps=1:0.001", "--kld-min-speedup=4:1000"),
    )
    assert run.returncode == pytest.ExitCode.TESTS_FAILED, run.stdout + run.stderr
    assert result["outcome"] == "failed"
    assert all(check["passed"] for check in result["checks"]), "the quality passes"
    assert [(check["limit"], check["state"]) for check in result["speed"]["checks"]] == [
        ("min_output_tps", "pass"),
        ("min_speedup", "fail"),
    ]
    assert "1 of 2 limits on speed exceeded" in result["message"]
    for side in ("candidate", "base"):
        measured = result["speed"][side]
        assert [cell["concurrency"] for cell in measured["cells"]] == list(CONCURRENCIES)
        for cell in measured["cells"]:
            figures = cell["figures"]
            assert figures.keys() == FIGURES.keys()
            assert figures["failed"] == 0
            raw = json.loads((Path(measured["raw"]) / f"c{cell['concurrency']}-round1.json").read_text())
            assert raw["completed"] == cell["requests"] == 4 * cell["concurrency"]
            assert raw["total_output_tokens"] == 4 * cell["requests"]
            assert figures["output_tps"] == pytest.approx(raw["total_output_tokens"] / raw["duration"])
            assert figures["request_rate"] == pytest.approx(cell["requests"] / raw["duration"])
            assert 0 < figures["ttft"] <= figures["e2e"]
    lines = run.stdout.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("Output tokens/s (16 tokens in, 4 out"))
    assert lines[start + 1].split() == ["Model", *(f"C={concurrency}" for concurrency in CONCURRENCIES)]
