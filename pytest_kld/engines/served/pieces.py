"""The files that the hook writes: rows of windows, and each rank's part of the head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pytest_kld.errors import CaptureError
from pytest_kld.hook.protocol import ORIGIN

_NARROWED_ROWS = 64
"""Number of rows compared at a time, to bound memory."""


def covers(pieces: dict[int, Path], first: int, count: int) -> bool:
    """Tell whether pieces, by their first positions, hold `count` rows of a window from position `first` on."""
    position = first
    for start in sorted(pieces):
        if start > position:
            return False
        position = max(position, start + _length(pieces[start], "token_ids"))
    return position >= first + count


def reaches(parts: dict[int, Path], vocab_size: int) -> bool:
    """Tell whether parts of the head, by their first rows, hold the whole vocabulary."""
    position = 0
    for start in sorted(parts):
        if start != position:
            return False
        position += _length(parts[start], "weight")
    return position >= vocab_size


def _length(path: Path, name: str) -> int:
    with _opened(path) as file:
        return int(file.get_slice(name).get_shape()[0])


def first_row(path: Path) -> int:
    """Return the first token id of a part of the head.

    Raises:
        CaptureError: the file does not tell it.

    """
    with _opened(path) as file:
        return int(file.metadata()["start"])


def first_position(path: Path) -> int:
    """Return the first position of a piece, which is in its name.

    Raises:
        CaptureError: it is not.

    """
    position = path.name.split(".")[1]
    if not (position.isascii() and position.isdecimal()):
        raise CaptureError(f"{path} is not named as the hook names its files: WINDOW.START.safetensors")
    return int(position)


def read_piece(path: Path, *required: str) -> dict[str, Tensor]:
    """Read one file.

    Args:
        path: the file.
        required: the names of tensors that it must have.

    Raises:
        CaptureError: it cannot be read, or lacks one of these tensors.

    """
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    for name in required:
        if name not in tensors or not tensors[name].dim():
            raise CaptureError(f"cannot read {path}: it has no rows of {name}")
    return tensors


def origin_of(path: Path) -> str | None:
    """Return the origin of the process that wrote a file.

    Raises:
        CaptureError: it cannot be read.

    """
    with _opened(path) as file:
        return (file.metadata() or {}).get(ORIGIN)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a file whose contents are those of another process, and may be anything."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CaptureError(f"cannot read {path}, which a server wrote: {error!r}") from error


def join(pieces: Sequence[dict[str, Tensor]], name: str) -> Tensor:
    """Concatenate the rows of consecutive pieces.

    Raises:
        CaptureError: a piece lacks them, or they do not fit together.

    """
    try:
        return torch.cat([piece[name] for piece in pieces])
    except (KeyError, RuntimeError) as error:
        raise CaptureError(f"the pieces that the hook wrote do not fit together: {name}: {error}") from error


def narrow(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return logits in the dtype of the product if they were only widened since; otherwise as they are."""
    narrowed = logits.to(dtype)
    for start in range(0, len(logits), _NARROWED_ROWS):
        wide, back = (rows[start : start + _NARROWED_ROWS] for rows in (logits, narrowed))
        same = (back.to(wide.dtype) == wide) | (back.isnan() & wide.isnan())
        if not same.all():
            return logits
    return narrowed
