"""Whole gates on the real SGLang: a real model, the examples, a cluster of two nodes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeModel
from sglang_cpu.environment import SGLangEnvironment
from transformers import LlamaConfig, Qwen3MoeConfig

from pytest_kld.servers.server import Server, ServerCommand, free_port

pytestmark = [pytest.mark.slow, pytest.mark.sglang]

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "conftest_examples"
SHORT = ("--kld-dataset=python-docs", "--kld-windows=2", "--kld-window-size=64", "--kld-stride=64")


def gate(directory: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    """Run pytest as a user does; return what it printed and the results in its JSON report."""
    report = directory / "report.json"
    command = [sys.executable, "-m", "pytest", *arguments, f"--kld-json={report}"]
    run = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    return run, json.loads(report.read_text())["results"] if report.is_file() else []


def test_sglang_and_transformers_agree_on_a_real_model(
    tmp_path: Path, environment: SGLangEnvironment, real_models: Path
) -> None:
    common = [
        *(f"--kld-ref={real_models / 'smollm2-135m'}", f"--kld-candidate={real_models / 'int8'}"),
        *(f"--kld-candidate={real_models / 'nvfp4'}", "--kld-max-mean=0.05", "--kld-dataset=python-docs"),
        *("--kld-windows=6", "--kld-window-size=512", "--kld-stride=512", f"--kld-cache-dir={tmp_path / 'cache'}"),
    ]
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    sglang = environment.with_dtype("float32").options()
    served, by_sglang = gate(tmp_path, *common, *sglang)
    assert served.returncode == pytest.ExitCode.TESTS_FAILED, served.stdout + served.stderr
    _, by_transformers = gate(tmp_path, *common, "--kld-engine=transformers")
    assert [result["outcome"] for result in by_sglang] == ["passed", "failed"]
    assert [result["outcome"] for result in by_transformers] == ["passed", "failed"]
    for ours, theirs in zip(by_sglang, by_transformers, strict=True):
        for figure in ("mean", "median", "p99", "max", "reference_ppl", "candidate_ppl"):
            assert ours["figures"][figure] == pytest.approx(theirs["figures"][figure], rel=0.01, abs=1e-5)
    again, repeated = gate(tmp_path, *common, *sglang)
    assert "booting" not in again.stdout
    assert [result["figures"] for result in repeated] == [result["figures"] for result in by_sglang]


def test_the_example_of_a_backend_matrix_runs(
    tmp_path: Path, environment: SGLangEnvironment, make_model: MakeModel
) -> None:
    moe = Qwen3MoeConfig(
        **{"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512},
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "tie_word_embeddings": False},
    )
    example = shutil.copytree(EXAMPLES / "moe_backends", tmp_path / "moe_backends")
    run, results = gate(
        example,
        f"--kld-ref={make_model('example-moe', moe)}",
        f"--kld-candidate={make_model('example-moe-candidate', moe, noise=0.0005)}",
        *environment.options(),
        *(f"--kld-moe-backend={backend}" for backend in MOE_BACKENDS),
        *SHORT,
        f"--kld-cache-dir={tmp_path / 'cache'}",
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert len(results) == 2 * len(MOE_BACKENDS)
    assert {result["candidate"].rsplit("(", 1)[1] for result in results} == {f"{name})" for name in MOE_BACKENDS}
    keys = [result["about"]["candidate"]["key"]["engine"]["arguments"] for result in results]
    assert all(any(key[0] == "--moe-runner-backend" for key in arguments) for arguments in keys)
    assert run.stdout.count("booting SGLang") == 1 + len(MOE_BACKENDS)


MOE_BACKENDS = ("auto", "triton")
"""Those that run on a CPU."""


def test_the_example_of_a_release_gate_runs(
    tmp_path: Path, environment: SGLangEnvironment, reference_dir: Path, make_model: MakeModel
) -> None:
    """Without its conftest.py, whose flags are for eight GPUs."""
    shutil.copy(EXAMPLES / "release_gate" / "test_release.py", tmp_path)
    shutil.copy(EXAMPLES / "release_gate" / "pytest.ini", tmp_path)
    run, results = gate(
        tmp_path,
        f"--kld-ref={reference_dir}",
        f"--kld-candidate={make_model('close', noise=0.0001)}",
        *environment.options(),
        *SHORT,
        *("--kld-max-mean=0.2", "--kld-max-p99=1", f"--kld-cache-dir={tmp_path / 'cache'}"),
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert [result["outcome"] for result in results] == ["passed"] * 3
    limits = {check["limit"] for check in results[0]["checks"]}
    assert limits == {"max_mean", "max_p99", "max_nan", "max_ref_nan", "max_cut_mass", "min_top1", "max_ppl_ratio"}


@pytest.mark.parametrize("name", ["release_gate", "moe_backends"])
def test_examples_are_collected_as_they_are(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", EXAMPLES / name]
    run = subprocess.run(
        [*map(str, command), f"--kld-junit={tmp_path / 'junit.xml'}", f"--kld-json={tmp_path / 'kld.json'}"],
        cwd=EXAMPLES / name,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Qwen3.5-397B-A17B-NVFP4" in run.stdout


def test_two_nodes_are_one_server_by_its_url(
    tmp_path: Path, environment: SGLangEnvironment, make_model: MakeModel
) -> None:
    """Two launches that find each other, as on two machines: rank 0 answers, each rank writes its part of the head."""
    model = make_model(
        "two-nodes",
        LlamaConfig(
            **{"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
            tie_word_embeddings=False,
        ),
    )
    shared = tmp_path / "shared"
    shared.mkdir()
    meeting = free_port()

    def node(rank: int) -> Server:
        port = free_port()
        distributed = ["--tp", "2", "--nnodes", "2", "--node-rank", str(rank)]
        return Server(
            ServerCommand(
                argv=[
                    *(str(environment.python), "-m", "sglang.launch_server", "--model-path", str(model)),
                    *("--host", "127.0.0.1", "--port", str(port), *environment.flags, *distributed),
                    *("--dist-init-addr", f"127.0.0.1:{meeting}"),
                ],
                environment={
                    **os.environ,
                    **environment.variables,
                    "PYTEST_KLD_CAPTURE_DIR": str(shared),
                    "SGLANG_CPU_OMP_THREADS_BIND": "0|1",
                    "OMP_NUM_THREADS": "1",
                },
                url=f"http://127.0.0.1:{port}",
                health="/health",
                log=tmp_path / f"node{rank}.log",
                startup_timeout=300,
            )
        )

    with ThreadPoolExecutor() as executor:
        nodes = list(executor.map(node, (0, 1)))
    try:
        run, results = gate(
            tmp_path,
            *(f"--kld-ref={model}", f"--kld-candidate={model}", f"--kld-ref-url={nodes[0].url}"),
            *(f"--kld-candidate-url={nodes[0].url}", f"--kld-capture-dir={shared}", "--kld-max-mean=0.01"),
            *(*SHORT, f"--kld-cache-dir={tmp_path / 'cache'}"),
        )
    finally:
        for one in nodes:
            one.stop()
    assert run.returncode == 0, run.stdout + run.stderr
    assert results[0]["figures"]["mean"] == 0.0
    assert results[0]["about"]["reference"]["store"] == "hidden"
