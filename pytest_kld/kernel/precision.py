"""Computes float32 products in full float32, regardless of the process's own settings."""

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
    """The precision that torch allows for float32 products in the whole process.

    Attributes:
        legacy: the value of `torch.get_float32_matmul_precision`, or the best estimate if torch refuses to return it.
        newer: `fp32_precision` for the products of CUDA and of oneDNN.

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
    """Return the legacy setting. Torch refuses to return it if the newer settings contradict it."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        pass
    try:
        allowed = torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # the legacy and the newer setting disagree on CUDA
        allowed = cuda != "tf32"
    return "high" if allowed else "highest"


def _backends() -> tuple[Any, Any]:
    return torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 products in float32, without TF32 or bfloat16, and restore the settings afterwards.

    `TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1`, which NVIDIA's images set, makes TF32 the process's initial setting. Torch
    reads it once, so a later setting wins. The settings apply to the whole process: if several threads are in this
    context, the first one sets them and the last one restores them. `NVIDIA_TF32_OVERRIDE` acts within cuBLAS and
    cannot be undone here.
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
