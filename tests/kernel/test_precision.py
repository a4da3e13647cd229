"""Products are made in full float32, whatever the process allows, and the process's settings come back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pytest_kld.kernel.head import Head
from pytest_kld.kernel.precision import full_float32

_SETTINGS = """
import json, torch

def settings():
    return [torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cuda.matmul.fp32_precision]

from torch.overrides import TorchFunctionMode

class Watch(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.mm, torch.nn.functional.linear, torch.Tensor.matmul, torch.Tensor.__matmul__):
            seen.append(settings())
        return function(*args, **(kwargs or {}))

from pytest_kld.kernel.head import Head, check_head
seen, before = [], settings()
head, hidden = Head(weight=torch.randn(9, 4)), torch.randn(3, 4)
half = Head(weight=head.weight.bfloat16())
with Watch():
    engine = head.logits(hidden)
    head.logits(hidden, "native")
    half.logits(hidden.bfloat16())
    check_head(head, hidden, engine)
print(json.dumps({"before": before, "seen": seen, "after": settings()}))
"""


def test_nvidias_images_allow_tf32_and_our_products_do_not_use_it() -> None:
    """The variable makes TF32 the initial setting, as in NVIDIA's images. What is read is what cuBLAS is told."""
    environment = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", _SETTINGS], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    told = json.loads(run.stdout)
    assert told["before"] == ["high", True, "tf32"]
    assert told["seen"] == [["highest", False, "ieee"]] * 4
    assert told["after"] == told["before"]


def settings() -> list[Any]:
    told: list[Any] = [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]
    for read in (torch.get_float32_matmul_precision, lambda: torch.backends.cuda.matmul.allow_tf32):
        try:
            told.append(read())
        except RuntimeError:  # torch refuses to tell where old and new settings disagree
            told.append("mixed")
    return told


@pytest.fixture
def restored() -> Iterator[None]:
    """Put the process's settings back to torch's own."""
    yield
    torch.set_float32_matmul_precision("highest")
    for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        backend.fp32_precision = "none"


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("way", ["nothing", "high", "medium", "cuda", "onednn", "disagreeing"])
def test_settings_come_back_however_they_were_made(way: str) -> None:
    if way in ("high", "medium"):
        torch.set_float32_matmul_precision(way)
    elif way == "cuda":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    elif way == "onednn":
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    elif way == "disagreeing":
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    before = settings()
    with full_float32():
        assert settings() == ["ieee", "ieee", "highest", False]
    assert settings() == before


@pytest.mark.usefixtures("restored")
def test_settings_come_back_after_an_error() -> None:
    torch.set_float32_matmul_precision("high")
    with pytest.raises(RuntimeError, match="shapes"):
        Head(weight=torch.zeros(5, 4)).logits(torch.zeros(2, 3))
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.usefixtures("restored")
def test_a_thread_that_ends_first_does_not_take_the_precision_from_another() -> None:
    torch.set_float32_matmul_precision("high")
    entered, leave, inside = threading.Event(), threading.Event(), []

    def first() -> None:
        with full_float32():
            entered.set()
            assert leave.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    assert entered.wait(10)
    with full_float32():
        leave.set()
        thread.join()
        inside.append(torch.get_float32_matmul_precision())
    assert inside == ["highest"]
    assert torch.get_float32_matmul_precision() == "high"
