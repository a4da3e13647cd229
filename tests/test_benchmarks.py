"""The benchmark's baseline computes what ours does. Timings are not asserted."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_kld.divergence import compiled_reduction, divergence

ORIGINAL = Path(__file__).parent.parent / "benchmarks" / "original.py"


@pytest.fixture(scope="module")
def original() -> Any:
    spec = importlib.util.spec_from_file_location("original", ORIGINAL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_baseline_and_kernel_agree_on_kl(original: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(7, 1000, generator=generator) * 3
    candidate = reference + torch.randn(7, 1000, generator=generator) * 0.3
    original.save_window(reference, tmp_path / "r.safetensors")
    original.save_window(candidate, tmp_path / "c.safetensors")
    theirs = original.compare_window(tmp_path / "r.safetensors", tmp_path / "c.safetensors", torch.device("cpu"))
    ours = divergence(reference, candidate, torch.full((7,), -1)).kl
    torch.testing.assert_close(theirs.double(), ours, rtol=1e-4, atol=1e-6)


def test_baseline_leaves_out_positions_with_nan(original: Any) -> None:
    log_probs = torch.zeros(3, 4).log_softmax(-1)
    broken = log_probs.clone()
    broken[1, 2] = torch.nan
    assert original.kl_per_position(log_probs, broken).tolist() == [0, 0]


@pytest.mark.filterwarnings("default")  # torch's compiler imports deprecated parts of torch
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_reduction_agrees_with_float64_over_whole_tiles_and_a_tail(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    reference = (torch.randn(6, 4099, generator=generator) * 3).to(dtype)
    candidate = reference + (torch.randn(6, 4099, generator=generator) * 1e-3).to(dtype)
    candidate[1] = torch.randn(4099, generator=generator) * 30  # far apart: most weights underflow
    reference[2, 5], candidate[2, 5] = -torch.inf, -torch.inf  # impossible on both sides
    reference[3, 5] = -torch.inf  # on the reference's alone
    candidate[4, 5] = -torch.inf  # on the candidate's alone
    candidate[5] = reference[5]
    p, q = reference.double().log_softmax(-1), candidate.double().log_softmax(-1)
    expected = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1)
    figures = divergence(reference, candidate, torch.full((6,), -1), reduction=compiled_reduction())
    assert figures.kl[4] == torch.inf
    assert figures.kl[5] == 0
    torch.testing.assert_close(figures.kl, expected.clamp(min=0), rtol=1e-4, atol=1e-12)


def test_arg_max_is_the_first_of_equals_across_tiles_and_in_the_tail() -> None:
    logits = torch.zeros(4, 4099)
    logits[1, [2047, 2048]] = 1
    logits[2, [4097, 4098]] = 1
    logits[3, 3000] = torch.nan
    figures = divergence(logits, logits, torch.full((4,), -1))
    assert figures.reference_argmax[:3].tolist() == [0, 2047, 4097]
    assert figures.flags.tolist() == [4, 4, 4, 7]
