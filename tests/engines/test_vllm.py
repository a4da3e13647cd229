"""The real vLLM: what becomes of heads, stores, ranks and stages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, MakeModel
from recorded import record
from served import Boot, Served, assert_same, booting, mean_kl
from transformers import AutoModelForCausalLM, Gemma2Config, Qwen3Config, Qwen3MoeConfig
from vllm_cpu.environment import VLLMEnvironment

from pytest_kld.captures.cache import Cache
from pytest_kld.captures.capture import Capture, Store
from pytest_kld.captures.recording import Recording
from pytest_kld.figures.compare import compare
from pytest_kld.figures.scores import Summary
from pytest_kld.progress import Silent
from pytest_kld.subjects.model import ModelSpec
from pytest_kld.text.corpus import load_corpus
from pytest_kld.text.windows import Windows, cut_windows, load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

SIZE = 128
ROWS = [SIZE // 2, SIZE - 1]
FOR_VLLM = {**TINY, "head_dim": 32}
"""On a CPU, vLLM runs heads of 32 and more."""
TWO_PROCESSES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


@pytest.fixture
def boot(vllm_cpu: VLLMEnvironment, tmp_path: Path) -> Iterator[Boot]:
    with booting(vllm_cpu, tmp_path) as boot:
        yield boot


@pytest.fixture(scope="module")
def gemma_dir(make_model: MakeModel) -> Path:
    """Its head is its embedding, and it has a softcap."""
    config = Gemma2Config(**FOR_VLLM, final_logit_softcapping=5.0, hidden_activation="gelu_pytorch_tanh")
    return make_model("vllm-gemma2", config)


@pytest.fixture(scope="module")
def text(gemma_dir: Path) -> Windows:
    """Four windows of 128 tokens."""
    tokenizer = load_tokenizer(ModelSpec.parse(str(gemma_dir), Path()), trust_remote_code=False)
    return cut_windows(load_corpus("python-docs", Path()), tokenizer, count=4, size=SIZE, stride=64, label="tiny")


@pytest.fixture(scope="module")
def gemma(vllm_cpu: VLLMEnvironment, gemma_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that runs one window at a time, as pytest-kld boots it."""
    with booting(vllm_cpu, tmp_path_factory.mktemp("gemma")) as boot:
        yield boot(gemma_dir, "--max-num-seqs", "1")


def recorded(served: Served, windows: Windows, directory: Path, store: Store) -> Capture:
    """Record a capture as the plugin does."""
    key = {"model": served.subject.name, "store": store}
    recording = Recording(engine=served.engine, subject=served.subject, windows=windows, store=store, key=key)
    cache = Cache(directory)
    entry = cache.capture_entry(key)
    recording.run(cache, entry, Silent())
    return Capture.open(entry, windows)


def figures(reference: Capture, candidate: Capture, windows: Windows, head: Any = "exact") -> dict[str, Any]:
    scores = compare(
        reference, candidate, windows, head=head, device=torch.device("cpu"), progress=Silent(), extended=False
    )
    return Summary.of(scores).to_json()


def assert_agrees_with_transformers(served: Served, windows: Windows) -> None:
    """Hidden states and head, and all logits, give the distributions that transformers gives."""
    model = AutoModelForCausalLM.from_pretrained(served.subject.spec.source, dtype=torch.float32)
    with served.connected() as loaded:
        (head,) = loaded.heads
    assert torch.equal(head.weight, model.get_output_embeddings().weight)
    for kept, all_rows in zip(served.capture(windows, ROWS), served.capture(windows, None), strict=True):
        assert kept.hidden is not None
        with torch.inference_mode():
            theirs = model(torch.from_numpy(windows.token_ids[kept.window]).long()[None]).logits[0]
        assert all_rows.logits.shape == theirs.shape
        assert mean_kl(theirs, all_rows.logits) < 1e-10
        assert mean_kl(theirs, head.logits(kept.hidden)) < 1e-10


def test_a_repeat_is_bit_identical(gemma: Served, text: Windows) -> None:
    assert_same(gemma.capture(text, ROWS), gemma.capture(text, ROWS))


@pytest.mark.parametrize("store", ["auto", "hidden", "logits", "logprobs"])
def test_every_store_agrees_with_transformers(
    gemma: Served, gemma_dir: Path, text: Windows, tmp_path: Path, store: Store
) -> None:
    theirs = record(gemma_dir, text, tmp_path / "theirs", store=store)
    ours = recorded(gemma, text, tmp_path / "ours", store)
    assert ours.manifest["store"] == {"auto": "hidden"}.get(store, store)
    for head in ("exact", "native"):
        found = figures(theirs, ours, text, head)
        assert found["positions"] == text.count * SIZE
        assert 0 < found["max"] < 1e-8


def test_a_softcap_and_a_tied_head_are_proved_by_check_rows(gemma: Served, text: Windows, tmp_path: Path) -> None:
    manifest = recorded(gemma, text, tmp_path, "auto").manifest
    assert manifest["store_reason"] == "check rows agree with the head"
    assert manifest["transforms"] == {"scale": 1.0, "softcap": 5.0}
    assert manifest["checks"]["rows"] > 0
    assert manifest["checks"]["worst"] <= 1
    assert manifest["facts"]["model_class"] == "Gemma2ForCausalLM"


def test_two_ranks_write_one_capture_of_a_mixture_of_experts(boot: Boot, make_model: MakeModel, text: Windows) -> None:
    config = Qwen3MoeConfig(
        **{**FOR_VLLM, "vocab_size": 1025, "tie_word_embeddings": False},
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1},
    )
    served = boot(make_model("vllm-moe", config), "--tensor-parallel-size", "2", **TWO_PROCESSES)
    with served.connected() as loaded:
        assert loaded.handshake["head_ranks"] == 2
        assert loaded.handshake["model_class"] == "Qwen3MoeForCausalLM"
        assert loaded.handshake["vocab_size"] == 1025
    assert_agrees_with_transformers(served, text)


def test_of_a_head_in_another_dtype_the_logits_are_kept(
    vllm_cpu: VLLMEnvironment, make_model: MakeModel, text: Windows, tmp_path: Path
) -> None:
    """They are products in float32, and a native head would round them to bfloat16."""
    model = make_model("vllm-qwen3", Qwen3Config(**FOR_VLLM, tie_word_embeddings=False))
    with booting(vllm_cpu.with_dtype("bfloat16"), tmp_path) as boot:
        served = boot(model, "--hf-overrides", '{"head_dtype": "float32"}')
        with served.connected() as loaded:
            assert loaded.handshake["head"]["kind"].endswith("computed in torch.float32")
        manifest = recorded(served, text, tmp_path / "cache", "auto").manifest
        assert {prefill.logits.dtype for prefill in served.capture(text, ROWS)} == {torch.float32}
    assert (manifest["store"], manifest["facts"]["dtype"]) == ("logits", "bfloat16")
