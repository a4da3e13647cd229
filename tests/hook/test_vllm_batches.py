"""The seam of vLLM's second model runner, on batches made of vLLM's own classes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, MakeModel
from safetensors.numpy import load_file
from transformers import LlamaConfig
from vllm_cpu.environment import HERE
from vllm_cpu.releases import second_runner_environment

from pytest_kld.hook.protocol import CaptureRequest, new_run, write_json_whole

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

ROWS = (2, 7)


@pytest.fixture(scope="module")
def run(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that two batches were captured for, with `expected.safetensors` beside the captures."""
    environment = second_runner_environment(tmp_path_factory.mktemp("hook"))
    model = make_model("batches-llama", LlamaConfig(**{**TINY, "vocab_size": 1025}, tie_word_embeddings=False))
    run = tmp_path_factory.mktemp("captures") / new_run()
    run.mkdir()
    write_json_whole(run / "request.json", CaptureRequest(hidden=True, rows=ROWS, head=True).to_json())
    subprocess.run(
        [environment.python, HERE / "v2_batches.py", model, run.parent, run.name, run / "expected.safetensors"],
        check=True,
        env={**os.environ, **environment.variables},
    )
    return run


@pytest.fixture(scope="module")
def expected(run: Path) -> dict[str, np.ndarray[Any, Any]]:
    return load_file(run / "expected.safetensors")


def pieces(run: Path, window: int) -> list[dict[str, np.ndarray[Any, Any]]]:
    """Read a window's pieces in the order of their positions."""
    paths = sorted(run.glob(f"{window}.*.safetensors"), key=lambda path: int(path.name.split(".")[1]))
    return [load_file(path) for path in paths]


def log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


@pytest.mark.parametrize(("window", "starts"), [(0, [0, 6]), (1, [0])])
def test_rows_are_those_of_the_request_in_their_order(
    run: Path, expected: dict[str, np.ndarray[Any, Any]], window: int, starts: list[int]
) -> None:
    assert sorted(int(path.name.split(".")[1]) for path in run.glob(f"{window}.*.safetensors")) == starts
    found = pieces(run, window)
    for name in ("hidden", "token_ids"):
        assert np.array_equal(np.concatenate([piece[name] for piece in found]), expected[f"{name}.{window}"])


@pytest.mark.parametrize("window", [0, 1])
def test_logits_are_those_that_vllm_makes_its_own_log_probs_of(
    run: Path, expected: dict[str, np.ndarray[Any, Any]], window: int
) -> None:
    hidden, head = (expected[name].astype(np.float64) for name in (f"hidden.{window}", "head"))
    rows = [row for row in ROWS if row < len(hidden)]
    found = pieces(run, window)
    assert np.concatenate([piece["rows"] for piece in found]).tolist() == rows
    logits = np.concatenate([piece["logits"] for piece in found])
    np.testing.assert_allclose(logits, hidden[rows] @ head.T, rtol=1e-4, atol=1e-4)
    token_ids = expected[f"token_ids.{window}"]
    log_probs = log_softmax(hidden @ head.T)[np.arange(len(hidden) - 1), token_ids[1:]]
    np.testing.assert_allclose(expected[f"log_probs.{window}"], log_probs, atol=1e-4)


def test_only_our_requests_are_captured_and_the_head_without_its_padding(
    run: Path, expected: dict[str, np.ndarray[Any, Any]]
) -> None:
    names = {path.name for path in run.iterdir()}
    assert names == {
        *("0.0.safetensors", "0.6.safetensors", "1.0.safetensors", "head-0.safetensors"),
        *("handshake.json", "request.json", "expected.safetensors"),
    }
    assert np.array_equal(load_file(run / "head-0.safetensors")["weight"], expected["head"])
    told = json.loads((run / "handshake.json").read_text())
    assert (told["engine"], told["arguments"]["model_runner"], told["vocab_size"]) == ("vllm", "V2", 1025)
