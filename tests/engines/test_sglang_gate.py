"""Whole gates on the real SGLang: a real model, the examples, a cluster of two nodes."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import TINY, MakeModel
from nvidia_smi import put_on_path
from served import gate
from sglang_cpu.environment import SGLangEnvironment
from transformers import LlamaConfig, Qwen3MoeConfig

from pytest_kld.servers.server import Server, ServerCommand, free_port

pytestmark = [pytest.mark.slow, pytest.mark.sglang]

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "conftest_examples"
SHORT = ("--kld-dataset=python-docs", "--kld-windows=2", "--kld-window-size=64", "--kld-stride=64")


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
            *("--kld-engine=sglang", f"--kld-ref={model}", f"--kld-candidate={model}", f"--kld-ref-url={nodes[0].url}"),
            *(f"--kld-candidate-url={nodes[0].url}", f"--kld-capture-dir={shared}", "--kld-max-mean=0.01"),
            *(*SHORT, f"--kld-cache-dir={tmp_path / 'cache'}"),
        )
    finally:
        for one in nodes:
            one.stop()
    assert run.returncode == 0, run.stdout + run.stderr
    assert results[0]["figures"]["mean"] == 0.0
    assert results[0]["about"]["reference"]["store"] == "hidden"


SUITE = """
[reference]
model = "{reference}"
args = {flags}
env = {{ {first} }}
[protocol]
engine = "sglang"
path = "both"
concurrency = 2
dataset = "python-docs"
windows = 2
window_size = 64
stride = 64
[limits]
max_mean = 0.5
max_decode_gap = 1e-6
[[candidate]]
name = "near"
model = "{candidate}"
args = {flags}
env = {{ {second} }}
"""


def test_a_suite_boots_servers_side_by_side_with_the_figures_of_one_after_the_other(
    tmp_path: Path, environment: SGLangEnvironment, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two servers on two fake GPUs, a processor core each; each is booted once and serves both paths."""
    put_on_path(tmp_path, monkeypatch, "GPU-0", "GPU-1")
    environment = environment.with_dtype("float32").with_overlap()
    config = LlamaConfig(**TINY, tie_word_embeddings=False)
    models = {
        "reference": make_model("side-reference", config),
        "candidate": make_model("side-candidate", config, noise=0.0005),
    }
    one_core = {**environment.variables, "OMP_NUM_THREADS": "1"}
    cores = {
        name: ", ".join(f'{key} = "{value}"' for key, value in {**one_core, BIND: core}.items())
        for name, core in (("first", "0"), ("second", str(min(1, (os.cpu_count() or 1) - 1))))
    }
    (tmp_path / "side.kld.toml").write_text(SUITE.format(**models, **cores, flags=json.dumps(environment.flags)))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = f"--kld-sglang-command={shlex.join(environment.command)}"
    side, by_side = gate(tmp_path, command, f"--kld-cache-dir={tmp_path / 'side'}")
    assert [row["outcome"] for row in by_side] == ["passed", "passed"], side.stdout + side.stderr
    notes = [line for line in side.stdout.splitlines() if line.startswith("kld: ")]
    booted = [index for index, note in enumerate(notes) if note.startswith("kld: booting")]
    ready = [index for index, note in enumerate(notes) if " is ready after " in note]
    assert (len(booted), len(ready)) == (2, 2)
    assert booted[1] < ready[0]  # the second boots while the first does
    assert any("side by side on 2 GPUs" in note for note in notes)
    monkeypatch.setenv("PATH", os.environ["PATH"].split(os.pathsep, 1)[1])  # no GPUs
    serial, one_by_one = gate(tmp_path, command, f"--kld-cache-dir={tmp_path / 'serial'}")
    assert "side by side" not in serial.stdout
    assert serial.stdout.count("kld: booting") == 2
    assert [row["figures"] for row in by_side] == [row["figures"] for row in one_by_one]


BIND = "SGLANG_CPU_OMP_THREADS_BIND"


def test_the_floor_of_two_servers_on_a_cpu_is_zero_on_both_paths(
    tmp_path: Path, environment: SGLangEnvironment, reference_dir: Path, candidate_dir: Path
) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    run, results = gate(
        tmp_path,
        *(f"--kld-ref={reference_dir}", f"--kld-candidate={candidate_dir}", *environment.options(), *SHORT),
        *("--kld-floor", "--kld-path=both", "--kld-concurrency=2", "--kld-max-mean=1"),
        f"--kld-cache-dir={tmp_path / 'cache'}",
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("booting SGLang") == 4
    assert [result["candidate"] for result in results] == [str(candidate_dir), f"{candidate_dir} (decode)"]
    for result in results:
        assert {result["floor"][side]["max"] for side in ("reference", "candidate")} == {0}
        assert result["figures"]["mean"] > 1e-3
    manifests = [json.loads(path.read_text()) for path in (tmp_path / "cache").glob("captures/*/capture.json")]
    runs = {(one["subject"]["name"], one["subject"]["run"], one["origin"]) for one in manifests}
    assert (len(manifests), len(runs), len({origin for *_, origin in runs})) == (8, 4, 4)
