"""Whole runs on a GPU: both heads, the served engines that are installed, and the benchmark. Skipped without CUDA."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL_RUN, MakeModel
from served import gate
from transformers import Qwen3Config

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
CONFIG: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "vocab_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 512,
    "dtype": "bfloat16",
}
"""Sizes that the attention kernels of GPUs support."""


@pytest.fixture(scope="module")
def pair(make_model: MakeModel) -> tuple[Path, Path]:
    config = Qwen3Config(**CONFIG, tie_word_embeddings=False)
    return make_model("cuda-reference", config), make_model("cuda-candidate", config, noise=0.0005)


def figures(directory: Path, pair: tuple[Path, Path], *options: str) -> dict[str, Any]:
    (directory / "pytest.ini").write_text("[pytest]\n")
    models = f"--kld-ref={pair[0]}", f"--kld-candidate={pair[1]}", "--kld-max-mean=10"
    run, results = gate(directory, *models, *SMALL_RUN, f"--kld-cache-dir={directory / 'cache'}", *options)
    assert run.returncode == 0, run.stdout + run.stderr
    found: dict[str, Any] = results[0]["figures"]
    return found


@pytest.mark.parametrize("head", ["exact", "native"])
def test_both_heads_agree_on_cuda(head: str, tmp_path: Path, pair: tuple[Path, Path]) -> None:
    stored = figures(tmp_path, pair, "--kld-engine=transformers", f"--kld-head={head}")
    logits = figures(tmp_path, pair, "--kld-engine=transformers", "--kld-store=logits")
    assert stored["mean"] == pytest.approx(logits["mean"], rel=0.05, abs=1e-5)


@pytest.mark.parametrize("path", ["prefill", "both"])
@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_a_served_engine_agrees_with_transformers_on_cuda(
    engine: str, path: str, tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    if find_spec(engine) is None:
        pytest.skip(f"{engine} is not installed beside these tests")
    served = figures(tmp_path, pair, f"--kld-engine={engine}", f"--kld-path={path}")
    in_process = figures(tmp_path, pair, "--kld-engine=transformers", f"--kld-path={path}")
    for name in ("mean", "reference_ppl", "candidate_ppl"):
        assert served[name] == pytest.approx(in_process[name], rel=0.1)


@pytest.mark.slow
def test_the_benchmark_runs_on_cuda(real_models: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "run.py", "--models", real_models, "--device", "cuda"]
    run = subprocess.run([*command, "--windows=1", "--repeats=1"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "device cuda" in run.stdout
    assert "| mean KL, nats |" in run.stdout
