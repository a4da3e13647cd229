"""One real checkpoint in both real servers: what two engines differ by themselves."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from sglang_cpu.environment import SGLangEnvironment
from vllm_cpu.environment import VLLMEnvironment

pytestmark = [pytest.mark.slow, pytest.mark.sglang, pytest.mark.vllm]


def test_the_same_checkpoint_in_sglang_and_vllm_differs_by_rounding(
    tmp_path: Path, environment: SGLangEnvironment, vllm_cpu: VLLMEnvironment, real_models: Path
) -> None:
    model, report = real_models / "smollm2-135m", tmp_path / "report.json"
    sglang = environment.with_dtype("float32")
    options = [
        *(f"--kld-ref={model}", f"--kld-candidate={model}", "--kld-engine=sglang", "--kld-candidate-engine=vllm"),
        f"--kld-sglang-command={shlex.join(sglang.command)}",
        f"--kld-vllm-command={shlex.join(vllm_cpu.command)}",
        f"--kld-ref-args={shlex.join(sglang.flags)}",
        f"--kld-candidate-args={shlex.join(vllm_cpu.flags)} --max-model-len 512",
        *(f"--kld-ref-env={name}={value}" for name, value in sglang.variables.items()),
        *(f"--kld-candidate-env={name}={value}" for name, value in vllm_cpu.variables.items()),
        *("--kld-dataset=python-docs", "--kld-windows=4", "--kld-window-size=256", "--kld-stride=256"),
        *(f"--kld-cache-dir={tmp_path / 'cache'}", "--kld-max-mean=1e-8", f"--kld-json={report}"),
    ]
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (result,) = json.loads(report.read_text())["results"]
    assert 0 < result["figures"]["mean"] < 1e-9
    assert result["candidate"] == f"{model} (vllm)"
    engines = [result["about"][side]["key"]["engine"]["engine"] for side in ("reference", "candidate")]
    assert engines == ["sglang", "vllm"]
    assert f"{model} (vllm) ran in vllm and the reference in sglang" in run.stdout.replace("\n", " ")
