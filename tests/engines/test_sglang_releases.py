"""The hook in older releases of the real SGLang: patched ones, and the range that has plugins."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import TINY, MakeModel
from served import Served, booting, mean_kl
from sglang_cpu.environment import disables_overlap
from sglang_cpu.releases import make_readable, release_environment
from transformers import AutoModelForCausalLM, LlamaConfig

from pytest_kld.engines import Prefill
from pytest_kld.hook.protocol import CaptureRequest
from pytest_kld.subjects.model import ModelSpec
from pytest_kld.text.corpus import load_corpus
from pytest_kld.text.windows import Windows, cut_windows, load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.sglang]

SIZE = 400
PREFILL_CHUNK, LOGITS_CHUNK = 160, 100
ROWS = [0, LOGITS_CHUNK - 1, PREFILL_CHUNK, SIZE - 1]


@pytest.fixture(scope="module")
def llama_dir(make_model: MakeModel) -> Path:
    """A tiny Llama whose files every release reads."""
    path = make_model("old-llama", LlamaConfig(**TINY, tie_word_embeddings=False))
    make_readable(path)
    return path


@pytest.fixture(scope="module")
def text(llama_dir: Path) -> Windows:
    """Six windows of 400 tokens."""
    tokenizer = load_tokenizer(ModelSpec.parse(str(llama_dir), Path()), trust_remote_code=False)
    return cut_windows(load_corpus("python-docs", Path()), tokenizer, count=6, size=SIZE, stride=200, label="llama")


@pytest.fixture(scope="module", params=["0.5.9", "0.5.10.post1", "0.5.15.post1"])
def served(
    request: pytest.FixtureRequest, llama_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """A server that splits prefills and logits and puts up to three requests into a batch, with overlap scheduling."""
    environment = release_environment(request.param, tmp_path_factory.mktemp("hook")).with_overlap()
    with booting(environment, tmp_path_factory.mktemp("served")) as boot:
        served = boot(
            llama_dir,
            *("--prefill-max-requests", "3", "--chunked-prefill-size", str(PREFILL_CHUNK)),
            SGLANG_ENABLE_LOGITS_PROCESSER_CHUNK="1",
            SGLANG_LOGITS_PROCESSER_CHUNK_SIZE=str(LOGITS_CHUNK),
        )
        with served.connected() as loaded:
            assert loaded.handshake["version"] == request.param
        assert not disables_overlap(served)
        yield served


@pytest.fixture(scope="module")
def captured(served: Served, text: Windows) -> list[Prefill]:
    return served.capture(text, ROWS)


def blocks(served: Served, text: Windows, count: int) -> list[int]:
    """Send the first tokens of a window and return the positions at which blocks of logits began."""
    with served.connected() as loaded, loaded.run(CaptureRequest(hidden=True)) as run:
        loaded._ask(run, 0, text.token_ids[0, :count].tolist())
        loaded.pieces(run, 0, count)
        return sorted(int(path.name.split(".")[1]) for path in run.glob("0.*.safetensors"))


def test_hidden_states_and_head_give_the_logits_of_the_server(
    served: Served, captured: list[Prefill], text: Windows
) -> None:
    with served.connected() as loaded:
        (head,) = loaded.heads
    assert [prefill.window for prefill in captured] == list(range(text.count))
    for prefill in captured:
        assert prefill.hidden is not None
        assert prefill.hidden.shape == (SIZE, TINY["hidden_size"])
        assert prefill.logits.shape == (len(ROWS), TINY["vocab_size"])
        assert torch.equal(head.logits(prefill.hidden[ROWS], "native"), prefill.logits)


def test_several_requests_were_in_a_batch(served: Served, captured: list[Prefill]) -> None:
    assert captured
    batches = re.findall(r"Prefill batch.*?#new-seq: (\d+).*?#new-token: (\d+)", served.log)
    assert max(int(sequences) for sequences, _ in batches) > 1
    assert max(int(tokens) for _, tokens in batches) == PREFILL_CHUNK


def test_both_paths_to_the_logits_are_captured(served: Served, text: Windows) -> None:
    assert blocks(served, text, LOGITS_CHUNK) == [0]
    assert blocks(served, text, SIZE) == [0, 100, 160, 260, 320]


def test_all_logits_agree_with_transformers(
    served: Served, captured: list[Prefill], llama_dir: Path, text: Windows
) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32)
    with served.connected() as loaded:
        (head,) = loaded.heads
    for hidden, logits in zip(captured, served.capture(text, None), strict=True):
        assert hidden.hidden is not None
        with torch.inference_mode():
            theirs = model(torch.from_numpy(text.token_ids[hidden.window]).long()[None]).logits[0]
        assert mean_kl(theirs, logits.logits) < 1e-3
        assert mean_kl(theirs, head.logits(hidden.hidden)) < 1e-3


def test_decode_steps_agree_with_prefills(served: Served, captured: list[Prefill], text: Windows) -> None:
    with served.connected() as loaded:
        (head,) = loaded.heads
        steps = sorted(loaded.decode(text.decoded(360, 3), range(3), [SIZE - 1]), key=lambda one: one.window)
    assert [step.window for step in steps] == [0, 1, 2]
    for prefill, step in zip(captured, steps, strict=False):
        assert prefill.hidden is not None
        assert step.hidden is not None
        assert torch.equal(head.logits(step.hidden[-1:], "native"), step.logits)
        assert mean_kl(head.logits(prefill.hidden[360:]), head.logits(step.hidden)) < 1e-3
