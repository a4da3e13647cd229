"""The files that the hook writes: rows of windows, and each rank's part of the head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pytest_kld.errors import CaptureError

_NARROWED_ROWS = 64
"""Number of rows compared at a time, to bound memory."""


def covers(pieces: dict[int, Path], count: int) -> bool:
    """Tell whether pieces, by their first positions, hold all rows of a window."""
    position = 0
    for start in sorted(pieces):
        if start > position:
            return False
        position = max(position, start + _length(pieces[start], "token_ids"))
    return position >= count


def reaches(parts: dict[int, Path], vocab_size: int) -> bool:
    """Tell whether parts of the head, by their first rows, hold the whole vocabulary."""
    position = 0
    for start in sorted(parts):
        if start != position:
            return False
        position += _length(parts[start], "weight")
    return position >= vocab_size


def _length(path: Path, name: str) -> int:
    with safe_open(path, framework="pt") as file:
        return int(file.get_slice(name).get_shape()[0])


def first_row(path: Path) -> int:
    """Return the first token id of a part of the head."""
    with safe_open(path, framework="pt") as file:
        return int(file.metadata()["start"])


def read_piece(path: Path) -> dict[str, Tensor]:
    """Read one file.

    Raises:
        CaptureError: it cannot be read.

    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise CaptureError(f"cannot read {path}: {error}") from error


def join(pieces: Sequence[dict[str, Tensor]], name: str) -> Tensor:
    """Concatenate the rows of consecutive pieces."""
    return torch.cat([piece[name] for piece in pieces])


def narrow(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return logits in the dtype of the product if they were only widened since; otherwise as they are."""
    narrowed = logits.to(dtype)
    for start in range(0, len(logits), _NARROWED_ROWS):
        wide, back = (rows[start : start + _NARROWED_ROWS] for rows in (logits, narrowed))
        same = (back.to(wide.dtype) == wide) | (back.isnan() & wide.isnan())
        if not same.all():
            return logits
    return narrowed
