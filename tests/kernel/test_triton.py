"""The compiled reduction as it would run on a GPU: torch's compiler writes Triton code, and Triton interprets it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from vllm_cpu.environment import VLLMEnvironment

ROOT = Path(__file__).parents[2]
COLUMNS = 2 * 2048 + 300
"""Two whole tiles and a rest."""

pytestmark = [pytest.mark.slow, pytest.mark.vllm]  # vLLM's environment has Triton


def test_triton_code_of_the_compiled_reduction_agrees_with_float64(vllm_cpu: VLLMEnvironment, tmp_path: Path) -> None:
    torch.manual_seed(0)
    reference = torch.randn(6, COLUMNS) * 4
    candidate = reference + torch.randn(6, COLUMNS) * torch.tensor([0.0, 1e-3, 0.1, 1.0, 8.0, 30.0])[:, None]
    reference[1, 5], candidate[2, :100] = -torch.inf, -3e3
    labels = torch.arange(6)
    torch.save({"reference": reference, "candidate": candidate, "labels": labels}, tmp_path / "case")
    run = subprocess.run(
        [vllm_cpu.python, Path(__file__).with_name("triton_interpreted.py"), tmp_path / "case"],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "PATH": "/usr/bin:/bin"},
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["calls"] > 0  # it was Triton's code that ran
    p, q = reference.double().log_softmax(-1), candidate.double().log_softmax(-1)
    expected = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1)
    torch.testing.assert_close(torch.tensor(found["kl"], dtype=torch.float64), expected, rtol=2e-5, atol=1e-12)
