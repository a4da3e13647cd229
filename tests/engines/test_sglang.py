"""The real SGLang: captures through the hook."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from conftest import TINY, MakeModel
from served import Boot, Served, assert_same, booting, mean_kl
from sglang_cpu.environment import SGLangEnvironment, disables_overlap
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen3Config

from pytest_kld.captures.cache import Cache
from pytest_kld.captures.capture import Capture
from pytest_kld.captures.recording import Recording
from pytest_kld.engines import Prefill
from pytest_kld.errors import CaptureError, ServerError
from pytest_kld.hook.protocol import CaptureRequest, new_run, request_id, write_json_whole
from pytest_kld.kernel.head import check_head
from pytest_kld.progress import Silent
from pytest_kld.subjects.model import ModelSpec
from pytest_kld.text.corpus import load_corpus
from pytest_kld.text.windows import Windows, cut_windows, load_tokenizer
from pytest_kld.throughput.runner import LoadSettings, measure

pytestmark = [pytest.mark.slow, pytest.mark.sglang]

SIZE = 256
CHUNK = 256
"""Rows of which SGLang makes its own log-probs at a time, as pytest-kld boots it."""
ROWS = [SIZE // 2, SIZE - 1]


@pytest.fixture
def boot(environment: SGLangEnvironment, tmp_path: Path) -> Iterator[Boot]:
    with booting(environment, tmp_path) as boot:
        yield boot


@pytest.fixture
def boot_with_overlap(environment: SGLangEnvironment, tmp_path: Path) -> Iterator[Boot]:
    with booting(environment.with_overlap(), tmp_path) as boot:
        yield boot


@pytest.fixture(scope="module")
def llama_dir(make_model: MakeModel) -> Path:
    return make_model("llama", LlamaConfig(**TINY, tie_word_embeddings=True))


@pytest.fixture(scope="module")
def text(llama_dir: Path) -> Windows:
    """Eight windows of 256 tokens."""
    tokenizer = load_tokenizer(ModelSpec.parse(str(llama_dir), Path()), trust_remote_code=False)
    return cut_windows(load_corpus("python-docs", Path()), tokenizer, count=8, size=SIZE, stride=128, label="llama")


@pytest.fixture(scope="module")
def served(
    environment: SGLangEnvironment, llama_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """A tiny Llama with a tied head, as pytest-kld boots it."""
    with booting(environment, tmp_path_factory.mktemp("served")) as boot:
        yield boot(llama_dir)


@pytest.fixture(scope="module")
def captured(served: Served, text: Windows) -> list[Prefill]:
    return served.capture(text, ROWS)


def test_the_last_id_of_the_vocabulary_is_captured_although_answers_name_another(
    served: Served, text: Windows, llama_dir: Path
) -> None:
    """SGLang tells 0 in its place."""
    ids = text.token_ids[:1].copy()
    ids[0, ROWS[0] + 1] = TINY["vocab_size"] - 1
    (prefill,) = served.capture(replace(text.first(1), token_ids=ids), ROWS)
    model = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.bfloat16)
    with torch.inference_mode():
        theirs = model(torch.from_numpy(ids).long()).logits[0, ROWS]
    assert mean_kl(theirs, prefill.logits) < 1e-3


def test_a_capture_after_a_load_is_the_same_to_the_bit_and_the_figures_are_the_load_generators(
    served: Served, text: Windows, captured: list[Prefill], tmp_path: Path
) -> None:
    settings = LoadSettings(concurrencies=(1, 2), input_tokens=16, output_tokens=4, rounds=1)
    measured = measure(
        served.engine,
        served.subject,
        settings,
        tokenizer=served.subject.spec,
        directory=tmp_path / "load",
        progress=Silent(),
    )
    assert_same(served.capture(text, ROWS), captured)
    assert served.engine.servers.others(served.handle) == []
    for cell in measured["cells"]:
        raw = json.loads((tmp_path / "load" / f"c{cell['concurrency']}-round1.json").read_text())
        figures = cell["figures"]
        assert raw["completed"] == 4 * cell["concurrency"]
        assert raw["total_output_tokens"] == 4 * raw["completed"]
        assert raw["total_input_tokens"] == 16 * raw["completed"]
        assert figures["output_tps"] == raw["output_throughput"] == raw["total_output_tokens"] / raw["duration"]
        assert figures["ttft"] == pytest.approx(1000 * float(np.median(raw["ttfts"])))
        assert figures["e2e"] == raw["median_e2e_latency_ms"]
        assert "server_info" not in raw
    assert measured["server"]["added"][:2] == ["--prefill-max-requests", "1"]
    too_many = replace(settings, concurrencies=(16,))
    with pytest.raises(ServerError, match="runs at most 8 requests at a time, so concurrency 16"):
        measure(
            served.engine,
            served.subject,
            too_many,
            tokenizer=served.subject.spec,
            directory=tmp_path / "more",
            progress=Silent(),
        )


def test_hidden_states_and_head_are_what_the_logits_are_made_of(
    served: Served, captured: list[Prefill], text: Windows
) -> None:
    with served.connected() as loaded:
        (head,) = loaded.heads
        facts, handshake = loaded.facts, loaded.handshake
    assert [prefill.window for prefill in captured] == list(range(text.count))
    for prefill in captured:
        assert prefill.hidden is not None
        assert prefill.hidden.shape == (SIZE, TINY["hidden_size"])
        assert prefill.hidden.dtype == prefill.logits.dtype == torch.bfloat16
        assert check_head(head, prefill.hidden[ROWS], prefill.logits).faithful
        assert torch.equal(head.logits(prefill.hidden[ROWS], "native"), prefill.logits)
    assert facts.vocab_size == TINY["vocab_size"]
    assert facts.model_class == "LlamaForCausalLM"
    assert handshake["version"] == "0.5.23"


def test_all_logits_are_those_that_hidden_states_give(served: Served, captured: list[Prefill], text: Windows) -> None:
    with served.connected() as loaded:
        (head,) = loaded.heads
    for hidden, logits in zip(captured, served.capture(text, None), strict=True):
        assert hidden.hidden is not None
        assert logits.hidden is None
        assert torch.equal(head.logits(hidden.hidden, "native"), logits.logits)


def test_figures_agree_with_transformers(
    captured: list[Prefill], llama_dir: Path, text: Windows, served: Served
) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.bfloat16)
    with served.connected() as loaded:
        (head,) = loaded.heads
    for prefill in captured[:3]:
        assert prefill.hidden is not None
        with torch.inference_mode():
            theirs = model(torch.from_numpy(text.token_ids[prefill.window]).long()[None]).logits[0]
        assert mean_kl(theirs, head.logits(prefill.hidden)) < 5e-3


def test_a_repeat_is_bit_identical(served: Served, captured: list[Prefill], text: Windows) -> None:
    assert_same(served.capture(text, ROWS), captured)


def test_decode_steps_agree_with_a_prefill_of_transformers(
    served: Served, captured: list[Prefill], text: Windows, llama_dir: Path
) -> None:
    """Seven windows are two batches of four; the second is filled up."""
    decoded = text.decoded(100, 4)
    model = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32)
    with served.connected() as loaded:
        (head,) = loaded.heads
        rows = [decoded.first_position, SIZE - 1]
        by_hidden = sorted(loaded.decode(decoded, range(7), rows), key=lambda one: one.window)
        by_logits = sorted(loaded.decode(decoded, range(4), None), key=lambda one: one.window)
    assert [one.window for one in by_hidden] == list(range(7))
    for one in by_hidden:
        with torch.inference_mode():
            theirs = model(torch.from_numpy(text.token_ids[one.window]).long()[None]).logits[0, 100:]
        assert one.hidden is not None
        assert one.hidden.shape == (SIZE - 100, TINY["hidden_size"])
        assert torch.equal(head.logits(one.hidden[[0, -1]], "native"), one.logits)
        assert mean_kl(theirs, head.logits(one.hidden)) < 1e-3
    for one, other in zip(by_logits, by_hidden, strict=False):
        assert other.hidden is not None
        assert torch.equal(one.logits, head.logits(other.hidden, "native"))
    assert_same(served.capture(text, ROWS), captured)


def test_foreign_traffic_leaves_no_trace(served: Served, captured: list[Prefill], text: Windows) -> None:
    stop = threading.Event()
    sent = []

    def disturb() -> None:
        generator = np.random.default_rng(0)
        while not stop.is_set():
            ids = generator.integers(0, 1000, 100).tolist()
            body = {
                "input_ids": ids,
                "sampling_params": {"max_new_tokens": 3, "temperature": 0},
                "return_logprob": True,
                "logprob_start_len": 0,
            }
            requests.post(f"{served.handle.url}/generate", json=body, timeout=60).raise_for_status()
            requests.get(f"{served.handle.url}/health", timeout=60)
            sent.append(ids)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        time.sleep(1)
        assert_same(served.capture(text, ROWS), captured)
    finally:
        stop.set()
        thread.join()
    assert sent


def test_nothing_is_left_in_the_capture_directory(served: Served, captured: list[Prefill]) -> None:
    assert captured
    assert list(served.engine.capture_dir.iterdir()) == []


def test_a_broken_run_is_an_error_here_and_the_server_lives(served: Served, text: Windows) -> None:
    with served.connected() as loaded, loaded.run(CaptureRequest(hidden=True, rows=(1,))) as run:
        (run / "request.json").write_text("{ this is not JSON")
        with pytest.raises(CaptureError, match=r"the hook failed in the server:[\s\S]*JSONDecodeError"):
            loaded._window(run, CaptureRequest(hidden=True, rows=(1,)), 0, text.token_ids[0])
    assert served.capture(text, ROWS)


def test_a_request_that_the_server_refuses_is_an_error_that_quotes_it(served: Served, text: Windows) -> None:
    too_long = Windows(**{**_fields(text), "token_ids": np.tile(text.token_ids, 3)})
    with pytest.raises(ServerError, match="the server answered 400"):
        served.capture(too_long, ROWS)


def test_batches_chunked_prefill_and_chunked_logits_are_put_together(
    boot: Boot, llama_dir: Path, text: Windows, captured: list[Prefill]
) -> None:
    served = boot(
        llama_dir,
        *("--prefill-max-requests", "3", "--chunked-prefill-size", "160"),
        SGLANG_LOGPROB_CHUNK_SIZE="50",
    )
    batched = served.capture(text, ROWS)
    batches = re.findall(r"Prefill batch.*?#new-seq: (\d+).*?#new-token: (\d+)", served.log)
    assert max(int(sequences) for sequences, _ in batches) > 1
    assert max(int(tokens) for _, tokens in batches) <= 160
    for one, other in zip(batched, captured, strict=True):
        assert one.hidden is not None
        assert other.hidden is not None
        assert one.hidden.shape == other.hidden.shape
        # Another shape of a product may round differently, no more than that.
        assert mean_kl(one.logits, other.logits) < 1e-3
        assert (one.hidden.float() - other.hidden.float()).abs().max() < 0.1


def test_chunks_of_sglang_s_own_log_probs_change_no_bit(boot: Boot, llama_dir: Path) -> None:
    """Windows of 500 tokens: two chunks by default, as pytest-kld boots it, and one if it is told so."""
    tokenizer = load_tokenizer(ModelSpec.parse(str(llama_dir), Path()), trust_remote_code=False)
    corpus = load_corpus("python-docs", Path())
    windows = cut_windows(corpus, tokenizer, count=2, size=500, stride=500, label="llama")
    rows = [CHUNK - 1, CHUNK, 499]
    chunked = boot(llama_dir).capture(windows, rows)
    whole = boot(llama_dir, SGLANG_LOGPROB_CHUNK_SIZE="2048").capture(windows, rows)
    assert len(chunked) == windows.count
    assert_same(chunked, whole)


def test_three_requests_in_one_batch_and_one_that_is_not_ours(
    served: Served, text: Windows, captured: list[Prefill]
) -> None:
    """A batch request of SGLang's, with a foreign request between two of ours."""
    with served.connected() as loaded, loaded.run(CaptureRequest(hidden=True, rows=tuple(ROWS))) as run:
        body = {
            "input_ids": [text.token_ids[i].tolist() for i in (0, 1, 2)],
            "rid": [request_id(run.name, 0), "somebody-else", request_id(run.name, 2)],
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        requests.post(f"{served.handle.url}/generate", json=body, timeout=60).raise_for_status()
        for window in (0, 2):
            pieces = loaded.pieces(run, window, SIZE)
            hidden = torch.cat([piece["hidden"] for piece in pieces])
            expected = captured[window].hidden
            assert expected is not None
            assert (hidden.float() - expected.float()).abs().max() < 0.1
        assert not list(run.glob("1.*"))


def test_two_ranks_write_one_capture(boot_with_overlap: Boot, make_model: MakeModel, text: Windows) -> None:
    config = Qwen3Config(**{**TINY, "vocab_size": 1025}, tie_word_embeddings=False)
    served = boot_with_overlap(
        make_model("odd", config), "--tp", "2", SGLANG_CPU_OMP_THREADS_BIND="0|1", OMP_NUM_THREADS="1"
    )
    captured = served.capture(text, ROWS)
    with served.connected() as loaded:
        (head,) = loaded.heads
        assert loaded.handshake["arguments"]["tp_size"] == 2
    assert head.weight.shape == (1025, TINY["hidden_size"])
    saved = AutoModelForCausalLM.from_pretrained(served.subject.spec.source, dtype=torch.bfloat16)
    assert torch.equal(head.weight, saved.lm_head.weight)
    for prefill in captured:
        assert prefill.hidden is not None
        assert prefill.logits.shape == (2, 1025)
        assert torch.equal(head.logits(prefill.hidden[ROWS], "native"), prefill.logits)
    with served.connected() as loaded:  # both ranks force the same tokens
        steps = sorted(loaded.decode(text.decoded(200, 4), range(4), ROWS[1:]), key=lambda one: one.window)
    for prefill, step in zip(captured, steps, strict=False):
        assert prefill.hidden is not None
        assert step.hidden is not None
        assert torch.equal(head.logits(step.hidden[-1:], "native"), step.logits)
        assert mean_kl(head.logits(prefill.hidden[200:]), head.logits(step.hidden)) < 1e-3


def test_the_overlap_scheduler_changes_no_bit_of_decoding_and_a_server_decodes_no_more_than_it_admits(
    boot_with_overlap: Boot, llama_dir: Path, text: Windows, served: Served
) -> None:
    narrow = boot_with_overlap(llama_dir, "--max-running-requests", "2")
    assert (disables_overlap(served), disables_overlap(narrow)) == (True, False)
    steps = text.decoded(100, 2)
    with served.connected() as loaded:
        without = sorted(loaded.decode(steps, range(3), ROWS[1:]), key=lambda one: one.window)
    with narrow.connected() as loaded:
        assert_same(sorted(loaded.decode(steps, range(3), ROWS[1:]), key=lambda one: one.window), without)
        with pytest.raises(CaptureError, match=r"sequences together instead of 3\. Does the server admit as many"):
            list(loaded.decode(text.decoded(240, 3), range(3), ROWS[1:]))


SOFTCAP_ON_CPU = """
import importlib.machinery, sys

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "sglang.srt.layers.logits_processor":
            return None
        spec = super().find_spec(name, path, target)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            module._is_cpu = True

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder)
"""
"""Lets SGLang take its own branch for CPUs in one place: the other one is a Triton kernel."""


def test_a_softcap_in_float32_keeps_hidden_states(
    boot: Boot, environment: SGLangEnvironment, make_model: MakeModel, text: Windows, tmp_path: Path
) -> None:
    """SGLang applies Gemma's softcap in float32 to a product in bfloat16."""
    config = Gemma2Config(**TINY, final_logit_softcapping=5.0, hidden_act="gelu_pytorch_tanh")  # SGLang reads that name
    (tmp_path / "sitecustomize.py").write_text(SOFTCAP_ON_CPU)
    path = os.pathsep.join((str(tmp_path), environment.variables["PYTHONPATH"]))
    served = boot(make_model("gemma2", config), PYTHONPATH=path)
    assert {prefill.logits.dtype for prefill in served.capture(text, ROWS)} == {torch.float32}
    recording = Recording(
        engine=served.engine, subject=served.subject, windows=text, store="auto", key={"model": "gemma2"}
    )
    cache = Cache(tmp_path / "cache")
    entry = cache.capture_entry(recording.key)
    recording.run(cache, entry, Silent())
    capture = Capture.open(entry, text)
    assert capture.manifest["store_reason"] == "check rows agree with the head"
    assert capture.store == "hidden"
    assert capture.manifest["transforms"] == {"scale": 1.0, "softcap": 5.0}
    assert 0 < capture.manifest["checks"]["worst"] <= 1


def test_a_draft_model_never_reaches_a_capture_and_a_server_with_one_does_not_decode(
    boot: Boot, make_model: MakeModel, text: Windows
) -> None:
    """A standalone draft model carries the same request ids; the server then dies of a kernel that no CPU has."""
    target = make_model("target", Qwen3Config(**TINY, tie_word_embeddings=False))
    draft = make_model("draft", Qwen3Config(**{**TINY, "hidden_size": 32}, tie_word_embeddings=False))
    served = boot(
        target,
        *("--speculative-algorithm", "STANDALONE", "--speculative-draft-model-path", str(draft)),
        *("--speculative-num-steps", "2", "--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "3"),
        *("--attention-backend", "triton"),
        TRITON_INTERPRET="1",
    )
    with (
        served.connected() as loaded,
        pytest.raises(
            ServerError,
            match=r"it runs with --speculative-algorithm STANDALONE, and .* no token can be forced; leave out",
        ),
    ):
        list(loaded.decode(text.decoded(100, 2), range(2), None))
    run = served.engine.capture_dir / new_run()
    run.mkdir(parents=True)
    write_json_whole(run / "request.json", CaptureRequest(hidden=True, rows=(3,)).to_json())
    body = {
        "input_ids": text.token_ids[0, :32].tolist(),
        "rid": request_id(run.name, 0),
        "sampling_params": {"max_new_tokens": 4, "temperature": 0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    with suppress(requests.ConnectionError):
        requests.post(f"{served.handle.url}/generate", json=body, timeout=120)
    deadline = time.monotonic() + 30
    while not (run / "0.0.safetensors").is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    from safetensors.torch import load_file

    assert [path.name for path in run.glob("0.*")] == ["0.0.safetensors"]
    assert load_file(run / "0.0.safetensors")["hidden"].shape == (32, TINY["hidden_size"])
    assert not list(run.glob("error-*"))
    handshake = json.loads((run / "handshake.json").read_text())
    assert handshake["arguments"]["speculative_algorithm"] == "STANDALONE"


def _fields(windows: Windows) -> dict[str, Any]:
    return {name: getattr(windows, name) for name in windows.__slots__}
