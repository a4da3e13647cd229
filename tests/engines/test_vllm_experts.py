"""The real vLLM on models with experts: what the hook tells of them is what transformers uses."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest
import torch
from conftest import TINY, MakeModel
from recorded import record
from safetensors.torch import load_file, save_file
from served import Served, booting, foreign_traffic, gate
from transformers import Qwen3MoeConfig
from vllm_cpu.environment import VLLMEnvironment
from vllm_cpu.releases import second_runner_environment

from pytest_kld.captures.cache import Cache
from pytest_kld.captures.capture import Capture
from pytest_kld.captures.manifest import EXPERTS_FILE
from pytest_kld.captures.recording import Recording
from pytest_kld.captures.routes import TOKENS
from pytest_kld.figures.compare import compare
from pytest_kld.figures.experts import experts_seen
from pytest_kld.hook.protocol import CaptureRequest
from pytest_kld.progress import Silent
from pytest_kld.subjects.model import ModelSpec
from pytest_kld.text.corpus import load_corpus
from pytest_kld.text.windows import Windows, cut_windows, load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

EXPERTS, PER_TOKEN, WINDOWS, SIZE, CHUNK = 48, 4, 6, 256, 160
ROUTING = {"layers": [0, 2], "experts": EXPERTS, "unobserved": None}


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> Path:
    """A model with a dense layer between two with experts."""
    config = Qwen3MoeConfig(
        **{**TINY, "head_dim": 32, "num_hidden_layers": 3, "tie_word_embeddings": False},
        **{"num_experts": EXPERTS, "num_experts_per_tok": PER_TOKEN, "moe_intermediate_size": 32},
        mlp_only_layers=[1],
    )
    return make_model("vllm-experts", config)


@pytest.fixture(scope="module")
def text(model: Path) -> Windows:
    tokenizer = load_tokenizer(ModelSpec.parse(str(model), Path()), trust_remote_code=False)
    return cut_windows(load_corpus("python-docs", Path()), tokenizer, count=WINDOWS, size=SIZE, stride=128, label="moe")


@pytest.fixture(scope="module")
def theirs(model: Path, text: Windows, tmp_path_factory: pytest.TempPathFactory) -> Capture:
    """What transformers routes the text to."""
    return record(model, text, tmp_path_factory.mktemp("theirs"))


@pytest.fixture(scope="module", params=["V1", "V2"])
def served(
    request: pytest.FixtureRequest, vllm_cpu: VLLMEnvironment, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """Prefills in chunks, in batches that hold parts of several windows."""
    second = request.param == "V2"
    environment = second_runner_environment(tmp_path_factory.mktemp("hook")) if second else vllm_cpu
    with booting(environment, tmp_path_factory.mktemp("served")) as boot:
        served = boot(model, "--max-num-batched-tokens", str(CHUNK), "--max-num-seqs", "4")
        with served.connected() as loaded:
            assert loaded.handshake["arguments"]["model_runner"] == request.param
        yield served


@pytest.fixture(scope="module")
def ours(served: Served, text: Windows, tmp_path_factory: pytest.TempPathFactory) -> Capture:
    """What vLLM routes the text to, while others use the server too."""
    with foreign_traffic(served) as answered:
        capture = recorded(served, text, tmp_path_factory.mktemp("ours"))
    assert set(answered) == {200}
    return capture


def recorded(served: Served, windows: Windows, directory: Path) -> Capture:
    """Record a capture as the plugin does."""
    path = "prefill" if windows.decoding is None else "decode"
    subject, key = replace(served.subject, name="served", path=path), {"model": "served", "path": path}
    recording = Recording(engine=served.engine, subject=subject, windows=windows, store="auto", key=key)
    cache = Cache(directory)
    recording.run(cache, cache.capture_entry(key), Silent())
    return Capture.open(cache.capture_entry(key), windows)


def tokens_of(capture: Capture) -> torch.Tensor:
    with capture._open_file(EXPERTS_FILE) as file:
        return file.get_tensor(TOKENS)


def test_the_tokens_of_every_expert_are_those_that_transformers_counts(ours: Capture, theirs: Capture) -> None:
    assert ours.routing == ROUTING
    assert theirs.routing == ROUTING
    assert tokens_of(ours).sum(1).tolist() == [WINDOWS * SIZE * PER_TOKEN] * 2
    assert torch.equal(tokens_of(ours), tokens_of(theirs))


def test_every_position_has_the_experts_that_transformers_uses(ours: Capture, theirs: Capture, text: Windows) -> None:
    for window in range(text.count):
        assert torch.equal(ours.routes(window), theirs.routes(window))


def test_a_comparison_finds_no_changed_route(ours: Capture, theirs: Capture, text: Windows) -> None:
    scores = compare(theirs, ours, text, head="exact", device=torch.device("cpu"), progress=Silent())
    seen = experts_seen(scores.evidence, scores.columns["kl"])
    assert seen is not None
    assert seen["changed"] == 0
    assert seen["reference"] == seen["candidate"]


def test_decode_steps_tell_the_experts_that_transformers_uses(
    served: Served, theirs: Capture, text: Windows, tmp_path: Path
) -> None:
    decoded = recorded(served, text.decoded(200, 3), tmp_path)
    assert decoded.routing == ROUTING
    for window in range(text.count):
        assert torch.equal(decoded.routes(window), theirs.routes(window)[200:])


def test_two_ranks_tell_each_expert_once(
    vllm_cpu: VLLMEnvironment, model: Path, text: Windows, theirs: Capture, tmp_path: Path
) -> None:
    flags = ("--max-num-batched-tokens", str(CHUNK), "--max-num-seqs", "4", "--tensor-parallel-size", "2")
    with booting(vllm_cpu, tmp_path) as boot:
        prefills = boot(model, *flags, VLLM_CPU_OMP_THREADS_BIND="0|1").capture(text, [SIZE - 1])
    for prefill in prefills:
        assert prefill.experts is not None
        routes = prefill.experts.sort(-1).values
        assert torch.equal(routes, theirs.routes(prefill.window).to(torch.int32))


def test_experts_in_the_server_s_answers_are_those_that_the_hook_sees(
    model: Path, text: Windows, tmp_path: Path
) -> None:
    """Of the second runner: the first one does not boot with the flag on a CPU."""
    hook = tmp_path / "hook"
    hook.mkdir()
    environment = second_runner_environment(hook)
    flags = ("--max-num-batched-tokens", str(CHUNK), "--max-num-seqs", "1", "--enable-return-routed-experts")
    with booting(environment, tmp_path) as boot:
        served = boot(model, *flags)
        with served.connected() as loaded, loaded.run(CaptureRequest(hidden=True, rows=(SIZE - 1,))) as run:
            for window in range(3):
                answer = loaded._ask(run, window, text.token_ids[window].tolist())
                pieces = loaded.pieces(run, window, SIZE)
                seen = loaded._experts(window, pieces, answer)
                unseen = [{name: it for name, it in piece.items() if name != "experts"} for piece in pieces]
                told = loaded._experts(window, unseen, answer)
                assert seen is not None
                assert told is not None
                assert seen.shape == (SIZE, 2, PER_TOKEN)
                assert torch.equal(told.sort(-1).values, seen.sort(-1).values)


def test_a_broken_expert_that_the_text_does_not_reach_is_shown_as_unseen(
    vllm_cpu: VLLMEnvironment, model: Path, tmp_path: Path
) -> None:
    """Its weights are NaN, no figure shows it, and the limit on the experts that were met does."""
    options = [
        *(f"--kld-ref={model}", "--kld-engine=transformers", "--kld-dtype=float32", "--kld-max-mean=1e-6"),
        *("--kld-dataset=python-docs", "--kld-windows=1", "--kld-window-size=16", "--kld-stride=16"),
        f"--kld-cache-dir={tmp_path / 'cache'}",
    ]
    in_vllm = [
        *("--kld-candidate-engine=vllm", f"--kld-vllm-command={shlex.join(vllm_cpu.command)}"),
        f"--kld-candidate-args={shlex.join(vllm_cpu.flags)}",
        *(f"--kld-candidate-env={name}={value}" for name, value in vllm_cpu.variables.items()),
    ]
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    _, (own,) = gate(tmp_path, *options, f"--kld-candidate={model}")
    first = own["saw"]["experts"]["candidate"]["layers"][0]
    layer, unseen = first["layer"], first["never"]
    broken = tmp_path / "broken"
    copytree(model, broken)
    weights = load_file(broken / "model.safetensors")
    for name, weight in weights.items():
        if f"layers.{layer}.mlp.experts.{unseen[0]}." in name:
            weight.fill_(float("nan"))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    run, (result,) = gate(tmp_path, *options, *in_vllm, f"--kld-candidate={broken}", "--kld-min-experts-seen=1")
    assert run.returncode == 1, run.stdout + run.stderr
    assert "FAIL  share of experts met 0." in run.stdout
    assert result["saw"]["experts"]["candidate"]["layers"][0]["never"] == unseen
    assert result["figures"]["experts_seen"] == own["figures"]["experts_seen"] < 1
    assert result["figures"]["candidate_nan_count"] == 0
    assert result["figures"]["mean"] < 1e-6
