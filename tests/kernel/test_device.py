"""Which device a name stands for."""

from __future__ import annotations

import pytest
import torch

from pytest_kld.errors import KLDError
from pytest_kld.kernel.device import pick_device


@pytest.mark.parametrize(("gpus", "kind"), [(0, "cpu"), (1, "cuda")])
def test_auto_is_a_gpu_if_torch_sees_one(gpus: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert pick_device("auto") == torch.device(kind)
    assert pick_device("cpu") == torch.device("cpu")


def test_a_gpu_that_torch_does_not_see_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [pick_device(f"cuda{index}") for index in ("", ":0", ":1")] == [
        torch.device(f"cuda{index}") for index in ("", ":0", ":1")
    ]
    with pytest.raises(KLDError, match=r"^--kld-device=cuda:2: torch sees 2 CUDA devices; give cpu or auto$"):
        pick_device("cuda:2")
