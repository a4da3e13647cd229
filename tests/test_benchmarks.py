"""The benchmark's baseline computes the same values as our code. Timings are not asserted."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import load
from pytest_kld.kernel.divergence import divergence

ORIGINAL = Path(__file__).parent.parent / "benchmarks" / "original.py"


@pytest.fixture(scope="module")
def original() -> Any:
    spec = importlib.util.spec_from_file_location("original", ORIGINAL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_baseline_and_kernel_agree_on_kl(original: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(7, 1000, generator=generator) * 3
    candidate = reference + torch.randn(7, 1000, generator=generator) * 0.3
    original.save_window(reference, tmp_path / "r.safetensors")
    original.save_window(candidate, tmp_path / "c.safetensors")
    theirs = original.compare_window(tmp_path / "r.safetensors", tmp_path / "c.safetensors", torch.device("cpu"))
    ours = divergence(reference, candidate, torch.full((7,), -1)).kl
    torch.testing.assert_close(theirs.double(), ours, rtol=1e-4, atol=1e-6)


def test_baseline_leaves_out_positions_with_nan(original: Any) -> None:
    log_probs = torch.zeros(3, 4).log_softmax(-1)
    broken = log_probs.clone()
    broken[1, 2] = torch.nan
    assert original.kl_per_position(log_probs, broken).tolist() == [0, 0]


def test_scores_of_many_positions_go_through_every_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load.positions(4 * load.SIZE, tmp_path)
    steps = [
        line.split(" | ")[0].lstrip("| ") for line in capsys.readouterr().out.splitlines() if line.endswith(" GB |")
    ]
    assert steps == ["summary", "intervals", "verdict", "profile", "JSON report", "HTML report", "save", "load"]
