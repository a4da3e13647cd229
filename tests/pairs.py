"""Scores of pairs of real models: logits computed by transformers, captures in the original layout, a comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from pytest_kld.captures.capture import Capture
from pytest_kld.figures.compare import compare
from pytest_kld.progress import Silent

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_kld.figures.scores import Scores
    from pytest_kld.text.windows import Windows


@torch.no_grad()
def log_probs_of(model: Any, windows: Windows) -> torch.Tensor:
    """Run a model: log-probabilities [windows, positions, vocabulary]."""
    return model(torch.from_numpy(windows.token_ids).long()).logits.float().log_softmax(-1)


def save_capture(path: Path, log_probs: torch.Tensor, windows: Windows) -> Capture:
    """Write log-probabilities in the original layout and open them as a capture."""
    path.mkdir()
    for index, window in enumerate(log_probs):
        save_file({"log_probs": window.contiguous()}, path / f"{index}.safetensors")
    return Capture.open(path, windows)


def scores_of(path: Path, windows: Windows, reference: torch.Tensor, candidate: torch.Tensor) -> Scores:
    """Compare log-probabilities of two models."""
    captures = [
        save_capture(path / side, log_probs, windows)
        for side, log_probs in (("reference", reference), ("candidate", candidate))
    ]
    return compare(*captures, windows, head="exact", device=torch.device("cpu"), progress=Silent())
