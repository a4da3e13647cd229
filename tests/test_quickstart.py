"""End to end on a real model: run the quickstart as a newcomer does, and check its figures independently."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pytest_kld.figures.scores import Scores, Summary

pytestmark = pytest.mark.slow


def test_int8_and_fp8_pass_and_nvfp4_fails(quickstart: tuple[Path, str]) -> None:
    directory, printed = quickstart
    assert "The outcomes are as expected" in printed
    results = json.loads((directory / "report.json").read_text())["results"]
    means = [result["figures"]["mean"] for result in results]
    assert [result["outcome"] for result in results] == ["passed", "passed", "failed"]
    assert 0.001 < means[0] < 0.005 < means[1] < 0.05 < means[2]
    patterns = [[pattern["name"] for pattern in result["diagnosis"]["patterns"]] for result in results]
    assert patterns == [[], [], ["uniform-noise"]]
    assert (directory / "report.xml").is_file()


@torch.inference_mode()
def test_scores_agree_with_logits_computed_by_transformers_alone(quickstart: tuple[Path, str]) -> None:
    directory, _ = quickstart
    for path in (directory / "cache" / "scores").glob("*.safetensors"):
        scores = Scores.load(path)
        if not scores.about["candidate"]["model"].endswith("fp8"):
            continue
        sides = [AutoModelForCausalLM.from_pretrained(directory / "models" / name) for name in ("smollm2-135m", "fp8")]
        expected = []
        for token_ids in torch.from_numpy(scores.columns["token_ids"]).long():
            p, q = (side(token_ids[None]).logits[0].double().log_softmax(-1) for side in sides)
            expected.append((p.exp() * (p - q)).sum(-1))
        kl = torch.stack(expected)
        assert abs(float(kl.mean()) - Summary.of(scores).mean) < 1e-6
        assert (kl - torch.from_numpy(scores.columns["kl"])).abs().max() < 1e-5
        return
    pytest.fail("there are no scores of the FP8 candidate")


def test_gating_again_with_another_limit_computes_nothing(quickstart: tuple[Path, str]) -> None:
    directory, _ = quickstart
    command = [
        *(sys.executable, "-m", "pytest", "quickstart", "--kld-ref=quickstart/models/smollm2-135m"),
        *("--kld-candidate=quickstart/models/int8", "--kld-max-p99=0.001", "--kld-dataset=python-docs"),
        *("--kld-windows=16", "--kld-window-size=512", "--kld-stride=512", "--kld-cache-dir=quickstart/cache"),
    ]
    run = subprocess.run(command, cwd=directory.parent, capture_output=True, text=True, check=False)
    assert run.returncode == pytest.ExitCode.TESTS_FAILED
    assert "P99 KLD 0.01" in run.stdout
    assert "max_p99 0.001" in run.stdout
    assert "windows, done in" not in run.stdout  # neither capture nor comparison
