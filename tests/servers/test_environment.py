"""Which variables are in the key: those that engines and their kernels read, unless they cannot change a number."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from pytest_kld.captures.manifest import MANIFEST
from pytest_kld.servers.environment import numeric_environment

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Gate, MakeModel


@pytest.mark.parametrize(
    "name",
    [
        *("SGLANG_USE_AITER", "SGL_CPU_QUANTIZATION", "VLLM_X", "FLASHINFER_X", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
        *("TORCHINDUCTOR_X", "PYTORCH_X", "TRITON_INTERPRET", "NCCL_ALGO", "CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_X"),
        *("NVIDIA_TF32_OVERRIDE", "OMP_NUM_THREADS", "MKL_X", "ATEN_CPU_CAPABILITY", "DG_JIT_X", "AITER_X", "HIP_X"),
        *("ROCM_X", "KMP_X", "CUDA_HOME", "USE_TRITON_W8A8_FP8_KERNEL", "SGLANG_SYNC_TOKEN_IDS_ACROSS_TP"),
    ],
)
def test_what_may_change_numbers_is_kept(name: str) -> None:
    assert numeric_environment({name: "1"}) != numeric_environment({name: "0"}) != {}


def test_what_cannot_is_left_out() -> None:
    others = ("PATH", "HOME", "PYTHONHASHSEED", "HF_TOKEN", "CUDA_VISIBLE_DEVICES", "TRITON_CACHE_DIR", "NCCL_DEBUG")
    assert numeric_environment(dict.fromkeys(others, "x")) == {}


def test_secrets_are_digests_and_what_is_given_by_name_is_kept_and_wins() -> None:
    kept = numeric_environment({"SGLANG_API_KEY": "hunter2", "SGLANG_X": "1"}, {"SGLANG_X": "2", "PATH": "/bin"})
    assert list(kept) == ["PATH", "SGLANG_API_KEY", "SGLANG_X"]
    assert (kept["PATH"], kept["SGLANG_X"]) == ("/bin", "2")
    assert kept["SGLANG_API_KEY"].startswith("sha256:")
    assert numeric_environment({"SGLANG_API_KEY": "hunter3"})["SGLANG_API_KEY"] != kept["SGLANG_API_KEY"]


@pytest.mark.slow
def test_another_variable_makes_another_capture_and_reports_tell_it(
    gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel engineer's switch: `TORCH_X=1 pytest …` must not take the capture that was made without it."""
    report = ("--kld-json=report.json", "--kld-html=report.html", f"--kld-cache-dir={tmp_path}")

    def keys() -> tuple[int, dict[str, str]]:
        gate(*report).assert_outcomes(passed=1)
        (about,) = (result["about"] for result in gate.results())
        return len(list((tmp_path / "captures").glob(f"*/{MANIFEST}"))), about["candidate"]["key"]["engine"][
            "environment"
        ]

    assert keys()[0] == 2
    monkeypatch.setenv("TORCH_X", "of-a-test")
    captures, told = keys()
    assert (captures, told["TORCH_X"]) == (4, "of-a-test")
    assert "of-a-test" in (gate.path / "report.html").read_text()
    monkeypatch.delenv("TORCH_X")
    assert keys()[0] == 4


REMOTE = """
from transformers import Qwen3Config, Qwen3ForCausalLM

class RemoteConfig(Qwen3Config):
    pass

class RemoteModel(Qwen3ForCausalLM):
    config_class = RemoteConfig
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.roll(1, -1)
        return output
"""


@pytest.mark.slow
def test_a_repository_s_own_code_makes_another_capture(
    gate: Gate, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the option the candidate is an ordinary, close Qwen3; with it, its own code shifts all logits."""
    model = make_model("remote", noise=0.0005)
    (model / "remote.py").write_text(REMOTE)
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "remote.RemoteConfig", "AutoModelForCausalLM": "remote.RemoteModel"}
    (model / "config.json").write_text(json.dumps(config))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))

    def mean(*options: str) -> float:
        gate("--kld-json=report.json", f"--kld-cache-dir={tmp_path}", *options, candidates=(model,), subprocess=True)
        (result,) = gate.results()
        assert result["outcome"] == "passed", result["message"]
        return float(result["figures"]["mean"])

    assert mean() < 0.1
    assert mean("--kld-trust-remote-code") > 1
    assert mean() < 0.1
