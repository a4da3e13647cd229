"""What only a GPU shows: products on tensor cores, leases of real devices, a whole gate. Skipped without CUDA."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from conftest import Gate

from pytest_kld.kernel.divergence import divergence
from pytest_kld.kernel.head import Head, check_head
from pytest_kld.servers.gpus import query_gpus
from pytest_kld.servers.leases import lease, lease_device, visibility, visible_gpus

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.gpu

HIDDEN, VOCAB = 512, 8_001
"""A width that tensor cores like, and a vocabulary that they do not."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_exact_head_on_cuda_is_the_product_in_float64(dtype: torch.dtype) -> None:
    """A float32 sum of exact products is off by less than √H ε₃₂ ‖h‖ ‖w‖; TF32 is off by a thousand times that."""
    torch.manual_seed(0)
    hidden = torch.randn(64, HIDDEN).to(dtype)
    weight = torch.randn(VOCAB, HIDDEN).to(dtype)
    logits = Head(weight=weight.cuda()).logits(hidden.cuda())
    assert logits.dtype == torch.float32
    expected = hidden.double() @ weight.double().T
    norms = hidden.double().norm(dim=-1)[:, None] * weight.double().norm(dim=-1)
    tolerance = HIDDEN**0.5 * torch.finfo(torch.float32).eps * norms
    assert ((logits.cpu().double() - expected).abs() <= tolerance).all()


def test_logits_of_a_product_on_cuda_are_explained_by_their_head() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(16, HIDDEN).bfloat16().cuda(), torch.randn(VOCAB, HIDDEN).bfloat16().cuda()
    check = check_head(Head(weight=weight), hidden, hidden @ weight.T)
    assert check.faithful
    assert check.dtype == "bfloat16"
    other = weight.clone()
    other[17] *= 1.5
    assert not check_head(Head(weight=other), hidden, hidden @ weight.T).faithful


def test_divergence_on_cuda_is_that_in_float64() -> None:
    torch.manual_seed(0)
    reference, candidate = torch.randn(64, VOCAB) * 4, torch.randn(64, VOCAB) * 4
    labels = torch.randint(VOCAB, (64,))
    found = divergence(reference.cuda(), candidate.cuda(), labels.cuda()).kl.cpu().double()
    p, q = reference.double().log_softmax(-1), candidate.double().log_softmax(-1)
    torch.testing.assert_close(found, (p.exp() * (p - q)).sum(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not query_gpus("uuid"), reason="there is no nvidia-smi")
def test_a_comparison_holds_the_gpu_that_torch_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    assert uuid in query_gpus("uuid")
    with lease_device("cuda:0", {}, tmp_path) as held:
        assert held == uuid
        waited: list[bool] = []
        others = tuple(gpu for gpu in query_gpus("uuid") if gpu != uuid)
        if others:
            with lease(len(others), query_gpus("uuid"), tmp_path, lambda: waited.append(True)) as left:
                assert sorted(left) == sorted(others)
        assert not waited
    assert visibility(visible_gpus({"CUDA_VISIBLE_DEVICES": uuid}))["CUDA_VISIBLE_DEVICES"].isdecimal()


def test_a_whole_gate_on_cuda_agrees_with_one_on_a_cpu(gate: Gate) -> None:
    figures = {}
    for device in ("cpu", "cuda"):
        gate(f"--kld-device={device}", "--kld-json=report.json", subprocess=True).assert_outcomes(passed=1)
        (result,) = gate.results()
        figures[device] = result["figures"]
        engine = result["about"]["candidate"]["key"]["engine"]
        assert engine["devices"][0].startswith("cpu") is (device == "cpu")
    for name in ("mean", "p99", "reference_ppl", "candidate_ppl"):
        assert figures["cuda"][name] == pytest.approx(figures["cpu"][name], rel=0.01, abs=1e-5)
