"""The real SGLang on a model with experts: what the hook tells of them is what transformers uses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import requests
import torch
from conftest import TINY, MakeModel
from recorded import record
from sglang_cpu.environment import SGLangEnvironment
from test_sglang import Served, booting
from transformers import Qwen3MoeConfig

from pytest_kld.captures.cache import Cache
from pytest_kld.captures.capture import Capture
from pytest_kld.captures.manifest import EXPERTS_FILE
from pytest_kld.captures.recording import Recording
from pytest_kld.captures.routes import TOKENS
from pytest_kld.figures.compare import compare
from pytest_kld.figures.experts import experts_seen
from pytest_kld.figures.saw import what_was_seen
from pytest_kld.hook.protocol import CaptureRequest, request_id
from pytest_kld.progress import Silent
from pytest_kld.subjects.model import ModelSpec
from pytest_kld.text.corpus import load_corpus
from pytest_kld.text.windows import Windows, cut_windows, load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.sglang]

EXPERTS, CHUNK = 48, 160


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> Path:
    config = Qwen3MoeConfig(
        **TINY, num_experts=EXPERTS, num_experts_per_tok=4, moe_intermediate_size=32, tie_word_embeddings=False
    )
    return make_model("sglang-experts", config)


@pytest.fixture(scope="module")
def text(model: Path) -> Windows:
    """Six windows of 256 tokens."""
    tokenizer = load_tokenizer(ModelSpec.parse(str(model), Path()), trust_remote_code=False)
    return cut_windows(load_corpus("python-docs", Path()), tokenizer, count=6, size=256, stride=128, label="moe")


@pytest.fixture(scope="module")
def served(environment: SGLangEnvironment, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Prefills in chunks that hold parts of several windows, in float32."""
    flags = ("--dtype", "float32", "--chunked-prefill-size", str(CHUNK), "--prefill-max-requests", "3")
    with booting(environment, tmp_path_factory.mktemp("served")) as boot:
        yield boot(model, *flags)


@pytest.fixture(scope="module")
def captures(
    served: Served, model: Path, text: Windows, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Capture, Capture]:
    """The model's captures by transformers and by SGLang."""
    subject = replace(served.subject, name="served")
    recording = Recording(engine=served.engine, subject=subject, windows=text, store="auto", key={"model": "served"})
    cache = Cache(tmp_path_factory.mktemp("cache"))
    recording.run(cache, cache.capture_entry(recording.key), Silent())
    theirs = Capture.open(cache.capture_entry(recording.key), text)
    return record(model, text, tmp_path_factory.mktemp("cache")), theirs


def test_the_tokens_of_every_expert_are_those_that_transformers_counts(captures: tuple[Capture, Capture]) -> None:
    counts = []
    for capture in captures:
        assert capture.routing == {"layers": [0, 1], "experts": EXPERTS, "unobserved": None}
        with capture._open_file(EXPERTS_FILE) as file:
            counts.append(file.get_tensor(TOKENS))
    ours, theirs = counts
    assert ours.sum(1).tolist() == [6 * 256 * 4] * 2
    assert torch.equal(ours, theirs)


def test_every_position_has_the_experts_that_transformers_uses(
    captures: tuple[Capture, Capture], text: Windows
) -> None:
    for window in range(text.count):
        assert torch.equal(*(capture.routes(window) for capture in captures))


def test_decode_steps_tell_the_experts_that_transformers_uses(
    served: Served, captures: tuple[Capture, Capture], text: Windows, tmp_path: Path
) -> None:
    steps = text.decoded(200, 3)
    subject = replace(served.subject, name="decoded", path="decode")
    recording = Recording(engine=served.engine, subject=subject, windows=steps, store="auto", key={"model": "decoded"})
    cache = Cache(tmp_path)
    recording.run(cache, cache.capture_entry(recording.key), Silent())
    capture = Capture.open(cache.capture_entry(recording.key), steps)
    assert capture.routing == {"layers": [0, 1], "experts": EXPERTS, "unobserved": None}
    for window in range(text.count):
        assert torch.equal(capture.routes(window), captures[0].routes(window)[200:])


def test_a_comparison_finds_no_changed_route_and_says_what_ran(
    captures: tuple[Capture, Capture], text: Windows
) -> None:
    scores = compare(*captures, text, head="exact", device=torch.device("cpu"), progress=Silent())
    seen = experts_seen(scores.evidence, scores.columns["kl"])
    assert seen is not None
    assert seen["changed"] == 0
    assert seen["reference"] == seen["candidate"]
    saw = what_was_seen(scores, ["prefill"])
    assert saw["kv_cache"]["candidate"] == {"dtype": "auto", "chunk": CHUNK, "read": True}
    assert saw["engines"]["candidate"]["backends"]["attention_backend"] == "torch_native"


WITHOUT_PINNED_MEMORY = """
import importlib.machinery, sys

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "sglang.srt.mem_cache.pool_host.common":
            return None
        spec = super().find_spec(name, path, target)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            module._cuda_host_register = lambda *_: None

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder)
"""
"""Lets SGLang's own record of experts, which is for GPUs, keep its host memory unpinned."""


def test_experts_in_the_server_s_answers_are_those_that_the_hook_sees(
    environment: SGLangEnvironment, model: Path, text: Windows, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_PINNED_MEMORY)
    path = os.pathsep.join((str(tmp_path), environment.variables["PYTHONPATH"]))
    flags = ("--dtype", "float32", "--chunked-prefill-size", str(CHUNK), "--enable-return-routed-experts")
    with booting(environment, tmp_path) as boot:
        served = boot(model, *flags, PYTHONPATH=path)
        request = CaptureRequest(hidden=True, rows=(255,))
        with served.connected() as loaded, loaded.run(request) as run:
            for window in range(3):
                answer = loaded._ask(run, window, text.token_ids[window].tolist())
                pieces = loaded.pieces(run, window, 256)
                seen = loaded._experts(window, pieces, answer)
                unseen = [{name: it for name, it in piece.items() if name != "experts"} for piece in pieces]
                told = loaded._experts(window, unseen, answer)
                assert seen is not None
                assert told is not None
                assert seen.shape == (256, 2, 4)
                assert torch.equal(told.sort(-1).values, seen.sort(-1).values)


def test_two_ranks_tell_each_expert_once(
    environment: SGLangEnvironment, model: Path, text: Windows, captures: tuple[Capture, Capture], tmp_path: Path
) -> None:
    flags = ("--dtype", "float32", "--chunked-prefill-size", str(CHUNK), "--tp", "2")
    with booting(environment.with_overlap(), tmp_path) as boot:
        served = boot(model, *flags, SGLANG_CPU_OMP_THREADS_BIND="0|1", OMP_NUM_THREADS="1")
        prefills = served.capture(text, [255])
    for prefill in prefills:
        assert prefill.experts is not None
        routes = prefill.experts.sort(-1).values
        assert torch.equal(routes, captures[0].routes(prefill.window).to(torch.int32))


def test_a_request_that_is_not_ours_in_the_same_batch_is_not_counted(
    served: Served, text: Windows, captures: tuple[Capture, Capture]
) -> None:
    with served.connected() as loaded, loaded.run(CaptureRequest(hidden=True, rows=(255,))) as run:
        body = {
            "input_ids": [text.token_ids[3].tolist()[:50], text.token_ids[1].tolist()],
            "rid": ["somebody-else", request_id(run.name, 1)],
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": [-1, 0],
        }
        requests.post(f"{served.handle.url}/generate", json=body, timeout=60).raise_for_status()
        pieces = loaded.pieces(run, 1, 256)
    routes = torch.cat([piece["experts"] for piece in pieces]).sort(-1).values
    assert torch.equal(routes, captures[0].routes(1).to(torch.int32))
