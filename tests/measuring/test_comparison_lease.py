"""A comparison on a GPU holds that GPU's lease, so that no server is booted on it meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from filelock import FileLock, Timeout
from nvidia_smi import put_on_path

from pytest_kld.figures import compare as comparing
from pytest_kld.measuring import scoring

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Gate


def test_a_comparison_holds_the_lease_of_its_gpu_and_returns_it(
    gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no GPU here: the comparison is told of one, and computes on the CPU."""
    put_on_path(tmp_path, monkeypatch, "GPU-a", "GPU-b")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setattr(scoring, "lease_directory", lambda: tmp_path)
    monkeypatch.setattr(scoring, "pick_device", lambda _: torch.device("cuda", 0))
    lock = FileLock(tmp_path / "GPU-b.lock")

    def compare(*captures: Any, device: torch.device, **options: Any) -> Any:
        assert device == torch.device("cuda", 0)
        with pytest.raises(Timeout):
            lock.acquire(timeout=0)
        return comparing.compare(*captures, device=torch.device("cpu"), **options)

    monkeypatch.setattr(scoring, "compare", compare)
    gate(f"--kld-cache-dir={tmp_path / 'cache'}", "--kld-device=cpu").assert_outcomes(passed=1)
    with lock.acquire(timeout=0):
        assert lock.is_locked
