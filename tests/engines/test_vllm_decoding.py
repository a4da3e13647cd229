"""The real vLLM decoding: what comes back is right whatever shares the server, or it is an error."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
import torch
from conftest import TINY, MakeModel
from served import Boot, Served, assert_same, booting, gate, mean_kl
from transformers import AutoModelForCausalLM, LlamaConfig
from vllm_cpu.environment import VLLMEnvironment

from pytest_kld.engines import Prefill
from pytest_kld.errors import CaptureError, ServerError
from pytest_kld.subjects.model import ModelSpec
from pytest_kld.text.corpus import load_corpus
from pytest_kld.text.windows import Windows, cut_windows, load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

SIZE, PROMPT, TOGETHER, CHUNK = 240, 100, 4, 128
ROWS = [PROMPT, SIZE - 1]
CONFIG = {**TINY, "head_dim": 32, "vocab_size": 1025}
"""A vocabulary that vLLM pads, and heads of a size that it runs on a CPU."""


@pytest.fixture(scope="module")
def llama_dir(make_model: MakeModel) -> Path:
    return make_model("decoding-llama", LlamaConfig(**CONFIG))


@pytest.fixture(scope="module")
def text(llama_dir: Path) -> Windows:
    """Six windows of 240 tokens."""
    tokenizer = load_tokenizer(ModelSpec.parse(str(llama_dir), Path()), trust_remote_code=False)
    return cut_windows(load_corpus("python-docs", Path()), tokenizer, count=6, size=SIZE, stride=120, label="llama")


@pytest.fixture
def boot(vllm_cpu: VLLMEnvironment, tmp_path: Path) -> Iterator[Boot]:
    with booting(vllm_cpu, tmp_path) as boot:
        yield boot


@pytest.fixture(scope="module")
def served(vllm_cpu: VLLMEnvironment, llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that admits four sequences, and prefills a little more than one prompt a step."""
    with booting(vllm_cpu, tmp_path_factory.mktemp("decoding")) as boot:
        yield boot(llama_dir, "--max-num-seqs", str(TOGETHER), "--max-num-batched-tokens", str(CHUNK))


def decode(served: Served, windows: Windows, rows: Sequence[int] | None) -> list[Prefill]:
    with served.connected() as loaded:
        return sorted(loaded.decode(windows, range(windows.count), rows), key=lambda one: one.window)


def assert_agrees_with_transformers(served: Served, model_dir: Path, windows: Windows) -> None:
    """Hidden states and head, and all logits, of every decode step give the distributions of a prefill."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with served.connected() as loaded:
        (head,) = loaded.heads
    kept, all_rows = decode(served, windows, ROWS), decode(served, windows, None)
    assert [one.window for one in kept] == [one.window for one in all_rows] == list(range(windows.count))
    for one, other in zip(kept, all_rows, strict=True):
        with torch.inference_mode():
            theirs = model(torch.from_numpy(windows.token_ids[one.window]).long()[None]).logits[0, PROMPT:]
        assert one.hidden is not None
        assert one.hidden.shape == (SIZE - PROMPT, TINY["hidden_size"])
        assert torch.equal(one.logits, other.logits[[0, -1]])
        assert mean_kl(theirs, other.logits) < 1e-9
        assert mean_kl(theirs, head.logits(one.hidden)) < 1e-9


@contextmanager
def foreign_traffic(served: Served) -> Iterator[list[int]]:
    """Let another user generate meanwhile; yield the status of each answer."""
    stop, answered = threading.Event(), []

    def disturb() -> None:
        body = {"model": served.subject.spec.source, "prompt": list(range(10, 60)), "max_tokens": 5}
        while not stop.is_set():
            answered.append(requests.post(f"{served.handle.url}/v1/completions", json=body, timeout=60).status_code)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        yield answered
    finally:
        stop.set()
        thread.join()


def test_decode_steps_agree_with_a_prefill_of_transformers(served: Served, llama_dir: Path, text: Windows) -> None:
    """Six windows are two batches of four; the second is filled up. Four prompts of 100 tokens take four steps."""
    assert_agrees_with_transformers(served, llama_dir, text.decoded(PROMPT, TOGETHER))


def test_repeats_of_both_paths_are_bit_identical(served: Served, text: Windows) -> None:
    windows = text.decoded(PROMPT, TOGETHER)
    prefilled, decoded = served.capture(text, ROWS), decode(served, windows, ROWS)
    assert_same(decode(served, windows, ROWS), decoded)
    assert_same(served.capture(text, ROWS), prefilled)


def test_other_users_wait_if_the_server_is_full_and_else_it_is_an_error(served: Served, text: Windows) -> None:
    alone = decode(served, text.decoded(PROMPT, TOGETHER), ROWS)
    with foreign_traffic(served) as answered:
        beside = decode(served, text.decoded(PROMPT, TOGETHER), ROWS)
        with pytest.raises(CaptureError, match=r"(sequences together instead of 3|prefilled a sequence)"):
            decode(served, text.decoded(PROMPT, TOGETHER - 1), ROWS)
    assert set(answered) == {200}
    for one, other in zip(alone, beside, strict=True):
        assert mean_kl(one.logits, other.logits) < 1e-9
    assert list(served.engine.capture_dir.iterdir()) == []


def test_more_sequences_than_the_server_admits_are_an_error(served: Served, text: Windows) -> None:
    with pytest.raises(ServerError, match=r"it runs with --max-num-seqs 4, so it does not decode --kld-concurrency=5"):
        decode(served, text.decoded(PROMPT, TOGETHER + 1), ROWS)


def test_a_cache_too_small_for_all_sequences_is_an_error(boot: Boot, llama_dir: Path, text: Windows) -> None:
    """A block holds 128 tokens, so each sequence takes two; one is never used."""
    flags = ("--max-num-seqs", str(TOGETHER), "--num-gpu-blocks-override", "7", "--max-model-len", "256")
    served = boot(llama_dir, *flags, "--block-size", "128")
    with pytest.raises(CaptureError, match=r"(sequences together instead of 4|had no room for all sequences)"):
        decode(served, text.decoded(PROMPT, TOGETHER), ROWS)
    decode(served, text.decoded(PROMPT, TOGETHER - 1), ROWS)


def test_two_ranks_force_the_same_tokens(boot: Boot, llama_dir: Path, text: Windows) -> None:
    two = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    served = boot(llama_dir, "--max-num-seqs", str(TOGETHER), "--tensor-parallel-size", "2", **two)
    assert_agrees_with_transformers(served, llama_dir, text.decoded(PROMPT, TOGETHER))


def test_a_server_that_speculates_does_not_decode(boot: Boot, llama_dir: Path, text: Windows) -> None:
    speculation = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    served = boot(llama_dir, "--max-num-seqs", "4", "--speculative-config", json.dumps(speculation))
    with pytest.raises(ServerError, match="no token can be forced; leave out --speculative-config"):
        decode(served, text.decoded(PROMPT, TOGETHER), ROWS)


def test_one_boot_of_each_model_serves_a_gate_on_both_paths(
    vllm_cpu: VLLMEnvironment, llama_dir: Path, make_model: MakeModel, tmp_path: Path
) -> None:
    close = make_model("decoding-close", LlamaConfig(**CONFIG), noise=0.0005)
    run, results = gate(
        tmp_path,
        *(f"--kld-ref={llama_dir}", f"--kld-candidate={close}", *vllm_cpu.options(), "--kld-path=both"),
        *("--kld-dataset=python-docs", "--kld-windows=4", "--kld-window-size=128", "--kld-stride=128"),
        *("--kld-concurrency=2", "--kld-max-mean=0.1", "--kld-max-decode-gap=1e-8"),
        f"--kld-cache-dir={tmp_path / 'cache'}",
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("booting vLLM") == 2
    decoded, prefilled = sorted(results, key=lambda result: result["subjects"]["candidate"]["path"])
    paths = [result["subjects"]["candidate"]["path"] for result in (prefilled, decoded)]
    assert paths == ["prefill", "decode"]
    assert 0 < decoded["figures"]["mean"] == pytest.approx(prefilled["figures"]["mean"], rel=0.5)
    assert 0 <= decoded["figures"]["decode_gap"] < 1e-9
    assert 0 <= decoded["figures"]["reference_decode_gap"] < 1e-9
    assert decoded["about"]["protocol"]["decoding"] == {"prompt_size": 32, "concurrency": 2}
    assert ["--max-num-seqs", "2"] in decoded["about"]["candidate"]["key"]["engine"]["arguments"]
