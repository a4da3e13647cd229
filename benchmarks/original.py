"""The original method, as the baseline: float32 log-probabilities of every position on disk, then KL from two files."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional


def save_window(logits: Tensor, path: Path) -> None:
    """Write one window's log-probabilities [N, V] as float32 safetensors."""
    save_file({"log_probs": logits.float().log_softmax(-1).cpu().contiguous()}, path)


def kl_per_position(reference: Tensor, candidate: Tensor) -> Tensor:
    """Return KL(reference ‖ candidate) [n] in nats for the positions without NaN.

    Args:
        reference: [N, V] log-probabilities.
        candidate: [N, V] log-probabilities.

    """
    nan = reference.isnan().any(-1) | candidate.isnan().any(-1)
    if nan.any():
        reference, candidate = reference[~nan], candidate[~nan]
    return functional.kl_div(candidate, reference, log_target=True, reduction="none").sum(-1)


def compare_window(reference: Path, candidate: Path, device: torch.device) -> Tensor:
    """Load both sides of one window and return KL per position."""
    sides = [load_file(path)["log_probs"].to(device) for path in (reference, candidate)]
    return kl_per_position(*sides).cpu()
