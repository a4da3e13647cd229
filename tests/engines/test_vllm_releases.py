"""The hook in other releases of the real vLLM, and in its second model runner."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import TINY, MakeModel
from served import Served, booting, foreign_traffic, mean_kl
from transformers import AutoModelForCausalLM, LlamaConfig
from vllm_cpu.releases import release_environment, second_runner_environment

from pytest_kld.engines import Prefill
from pytest_kld.hook.protocol import CaptureRequest
from pytest_kld.subjects.model import ModelSpec
from pytest_kld.text.corpus import load_corpus
from pytest_kld.text.windows import Windows, cut_windows, load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

SIZE, CHUNK = 400, 128
ROWS = [0, CHUNK - 1, CHUNK, SIZE - 1]
IN_FLIGHT = 4
OLDER = ("0.27.1 V1", "0.31.0 V1")


@pytest.fixture(scope="module")
def llama_dir(make_model: MakeModel) -> Path:
    """A tiny Llama with heads of a size that vLLM runs on a CPU, and a vocabulary that it pads."""
    config = LlamaConfig(**{**TINY, "head_dim": 32, "vocab_size": 1025}, tie_word_embeddings=False)
    return make_model("vllm-llama", config)


@pytest.fixture(scope="module")
def text(llama_dir: Path) -> Windows:
    """Six windows of 400 tokens."""
    tokenizer = load_tokenizer(ModelSpec.parse(str(llama_dir), Path()), trust_remote_code=False)
    return cut_windows(load_corpus("python-docs", Path()), tokenizer, count=6, size=SIZE, stride=200, label="llama")


@pytest.fixture(scope="module", params=[*(pytest.param(older, marks=pytest.mark.long) for older in OLDER), "0.32.0 V2"])
def served(
    request: pytest.FixtureRequest, llama_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """A server that runs at most 128 tokens of up to four requests in a batch."""
    release, runner = request.param.split()
    hook = tmp_path_factory.mktemp("hook")
    environment = second_runner_environment(hook) if runner == "V2" else release_environment(release, hook)
    with booting(environment, tmp_path_factory.mktemp("served")) as boot:
        served = boot(llama_dir, "--max-num-batched-tokens", str(CHUNK), "--max-num-seqs", str(IN_FLIGHT))
        with served.connected() as loaded:
            assert loaded.handshake["version"].startswith(release)
            assert loaded.handshake["arguments"]["model_runner"] == runner
        yield served


@pytest.fixture(scope="module")
def captured(served: Served, text: Windows) -> list[Prefill]:
    with foreign_traffic(served) as answered:
        captured = served.capture(text, ROWS)
    assert set(answered) == {200}
    return captured


def test_hidden_states_and_head_give_the_logits_of_the_server(
    served: Served, captured: list[Prefill], text: Windows
) -> None:
    with served.connected() as loaded:
        (head,) = loaded.heads
    assert head.weight.shape == (1025, TINY["hidden_size"])
    assert [prefill.window for prefill in captured] == list(range(text.count))
    for prefill in captured:
        assert prefill.hidden is not None
        assert prefill.hidden.shape == (SIZE, TINY["hidden_size"])
        assert prefill.logits.shape == (len(ROWS), 1025)
        assert mean_kl(prefill.logits, head.logits(prefill.hidden[ROWS])) < 1e-9


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
        assert mean_kl(theirs, logits.logits) < 1e-9
        assert mean_kl(theirs, head.logits(hidden.hidden)) < 1e-9


def test_requests_share_batches_and_none_begins_after_its_first_token(served: Served, text: Windows) -> None:
    """A request that shares a batch of 128 tokens gets fewer of them. The second time, every prompt is cached."""
    with served.connected() as loaded, loaded.run(CaptureRequest(hidden=True)) as run:
        with ThreadPoolExecutor(IN_FLIGHT) as executor:
            for _ in executor.map(
                lambda index: loaded._ask(run, index, text.token_ids[index % 3].tolist()), range(2 * 3)
            ):
                pass
        starts = {index: [] for index in range(2 * 3)}
        for index in starts:
            loaded.pieces(run, index, SIZE)
            starts[index] = sorted(int(path.name.split(".")[1]) for path in run.glob(f"{index}.*.safetensors"))
    assert all(start[0] == 0 for start in starts.values())
    assert any(position % CHUNK for start in starts.values() for position in start)


def test_decode_steps_agree_with_a_prefill_of_transformers(served: Served, llama_dir: Path, text: Windows) -> None:
    """Four prompts of 350 tokens take eleven steps, and none is decoded meanwhile."""
    model, prompt = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32), 350
    with served.connected() as loaded:
        (head,) = loaded.heads
        found = list(loaded.decode(text.decoded(prompt, IN_FLIGHT), range(IN_FLIGHT), ROWS[-1:]))
    assert sorted(one.window for one in found) == list(range(IN_FLIGHT))
    for one in found:
        with torch.inference_mode():
            theirs = model(torch.from_numpy(text.token_ids[one.window]).long()[None]).logits[0, prompt:]
        assert one.hidden is not None
        assert mean_kl(theirs, head.logits(one.hidden)) < 1e-9
        assert mean_kl(theirs[-1:], one.logits) < 1e-9


def test_a_request_without_our_run_leaves_nothing(served: Served, text: Windows) -> None:
    with served.connected() as loaded:
        loaded._ask(served.engine.capture_dir / "no-such-run", 0, text.token_ids[0].tolist())
        assert list(served.engine.capture_dir.iterdir()) == []
