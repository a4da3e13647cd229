"""What a comparison leaves behind: neither heads nor memory of the device, also after an error."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from recorded import record

from pytest_kld.captures.capture import LogitsReader
from pytest_kld.errors import CaptureError
from pytest_kld.figures.compare import compare
from pytest_kld.kernel.head import Head
from pytest_kld.progress import Silent

if TYPE_CHECKING:
    from pytest_kld.captures.capture import Capture
    from pytest_kld.text.windows import Windows

CUDA = torch.device("cuda")


class Heads:
    """Watches the heads that are loaded, and what of them is alive when the allocator's cache is emptied."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._weights: list[weakref.ref[torch.Tensor]] = []
        self.alive_when_emptied: list[int] = []
        of = LogitsReader.of

        def on_the_cpu(capture: Capture, mode: Any, device: torch.device) -> LogitsReader:
            reader = of(capture, mode, torch.device("cpu"))
            assert reader.head is not None
            self._weights.append(weakref.ref(reader.head.weight))
            return reader

        monkeypatch.setattr(LogitsReader, "of", on_the_cpu)
        monkeypatch.setattr("torch.cuda.empty_cache", lambda: self.alive_when_emptied.append(self.alive))

    @property
    def loaded(self) -> int:
        return len(self._weights)

    @property
    def alive(self) -> int:
        return sum(weight() is not None for weight in self._weights)


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch) -> Heads:
    return Heads(monkeypatch)


@pytest.fixture
def captures(reference_dir: Path, candidate_dir: Path, windows: Windows, tmp_path: Path) -> list[Capture]:
    return [record(model, windows, tmp_path) for model in (reference_dir, candidate_dir)]


def test_heads_are_released_before_cudas_cache_is_emptied(
    captures: list[Capture], windows: Windows, heads: Heads
) -> None:
    scores = compare(*captures, windows, head="exact", device=CUDA, progress=Silent())
    assert scores.columns["kl"].shape == windows.token_ids.shape
    assert (heads.loaded, heads.alive) == (2, 0)
    assert heads.alive_when_emptied == [0]


def test_an_error_that_is_kept_keeps_no_head(
    captures: list[Capture], windows: Windows, heads: Heads, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logits(self: Head, hidden: torch.Tensor, mode: Any) -> torch.Tensor:
        weight = self.weight  # as a frame deep in the product holds it
        raise torch.OutOfMemoryError(f"CUDA out of memory: {tuple(weight.shape)}")

    monkeypatch.setattr(Head, "logits", logits)
    with pytest.raises(torch.OutOfMemoryError) as kept:
        compare(*captures, windows, head="exact", device=CUDA, progress=Silent())
    assert kept.tb is not None
    assert (heads.loaded, heads.alive) == (2, 0)
    assert heads.alive_when_emptied == [0]


def test_windows_that_differ_leave_no_head(captures: list[Capture], windows: Windows, heads: Heads) -> None:
    changed = windows.token_ids.copy()
    changed[2, 5] += 1
    with pytest.raises(CaptureError, match="token ids differ"):
        compare(*captures, replace(windows, token_ids=changed), head="exact", device=CUDA, progress=Silent())
    assert (heads.loaded, heads.alive, heads.alive_when_emptied) == (2, 0, [0])


def test_a_comparison_on_a_cpu_leaves_cuda_alone(captures: list[Capture], windows: Windows, heads: Heads) -> None:
    compare(*captures, windows, head="exact", device=torch.device("cpu"), progress=Silent())
    assert (heads.alive, heads.alive_when_emptied) == (0, [])
