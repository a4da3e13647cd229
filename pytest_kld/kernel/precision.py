"""Float32 products in full float32, whatever the process allows for its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

_lock = threading.Lock()
_users = 0
_before: _Settings | None = None


@dataclass(frozen=True, slots=True)
class _Settings:
    """What torch allows for float32 products, of the whole process.

    Attributes:
        legacy: as `torch.get_float32_matmul_precision` tells it, or as near as torch lets it be known.
        newer: `fp32_precision` of CUDA's and of oneDNN's products.

    """

    legacy: str
    newer: tuple[str, str]

    @classmethod
    def read(cls) -> _Settings:
        cuda, onednn = (backend.fp32_precision for backend in _backends())
        return cls(_legacy(cuda), (cuda, onednn))

    def write(self) -> None:
        torch.set_float32_matmul_precision(self.legacy)
        for backend, precision in zip(_backends(), self.newer, strict=True):
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision


def _legacy(cuda: str) -> str:
    """Return the legacy setting. Torch refuses to tell it when the newer settings say something else."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        pass
    try:
        allowed = torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # the two disagree on CUDA
        allowed = cuda != "tf32"
    return "high" if allowed else "highest"


def _backends() -> tuple[Any, Any]:
    return torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 products in float32: without TF32 or bfloat16 inside, and with the settings restored afterwards.

    `TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1`, which NVIDIA's images set, makes TF32 the process's initial setting. Torch
    reads it once, so a later setting wins. The settings are of the process: of several threads in here the first one
    sets them and the last one restores them. `NVIDIA_TF32_OVERRIDE` acts within cuBLAS, and nothing here can undo it.
    """
    global _users, _before
    with _lock:
        if _users == 0:
            _before = _Settings.read()
            torch.set_float32_matmul_precision("highest")
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                assert _before is not None
                _before.write()
                _before = None
