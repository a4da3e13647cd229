"""Whole gates of a real model on every engine's real server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cpu_environment import ServerEnvironment
from served import gate

pytestmark = pytest.mark.slow

FIGURES = ("mean", "median", "p99", "max", "reference_ppl", "candidate_ppl")


def options(models: Path, cache: Path) -> list[str]:
    return [
        *(f"--kld-ref={models / 'smollm2-135m'}", f"--kld-candidate={models / 'int8'}"),
        *(f"--kld-candidate={models / 'nvfp4'}", "--kld-max-mean=0.05", "--kld-dataset=python-docs"),
        *("--kld-windows=4", "--kld-window-size=256", "--kld-stride=256", f"--kld-cache-dir={cache}"),
    ]


@pytest.fixture(scope="module")
def by_transformers(real_models: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of the same gates in process."""
    directory = tmp_path_factory.mktemp("by-transformers")
    _, results = gate(directory, *options(real_models, directory / "cache"), "--kld-engine=transformers")
    assert [result["outcome"] for result in results] == ["passed", "failed"]
    return results


def test_verdicts_and_figures_are_those_of_transformers(
    tmp_path: Path, engine: ServerEnvironment, real_models: Path, by_transformers: list[dict[str, Any]]
) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    arguments = [*options(real_models, tmp_path / "cache"), *engine.options()]
    served, results = gate(tmp_path, *arguments)
    assert served.returncode == pytest.ExitCode.TESTS_FAILED, served.stdout + served.stderr
    assert [result["outcome"] for result in results] == ["passed", "failed"]
    for ours, theirs in zip(results, by_transformers, strict=True):
        for figure in FIGURES:
            assert ours["figures"][figure] == pytest.approx(theirs["figures"][figure], rel=0.01, abs=1e-5)
    again, repeated = gate(tmp_path, *arguments)
    assert "booting" not in again.stdout
    assert [result["figures"] for result in repeated] == [result["figures"] for result in results]
