"""The same with the real SGLang and vLLM behind an address: restarted, serving another model, or behind a proxy.

Not part of the README's command.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, MakeModel
from cpu_environment import ServerEnvironment
from guarantees.campaign import ENGINES
from guarantees.proxy import Proxy, behind
from served import Boot, Served, booting
from transformers import LlamaConfig

sys.path.insert(0, str(ENGINES))
from tiny_pool import capture

from pytest_kld.errors import CaptureError, KLDError, ServerError
from pytest_kld.subjects.model import ModelSpec
from pytest_kld.text.corpus import load_corpus
from pytest_kld.text.windows import Windows, cut_windows, load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.long]

CONFIG = LlamaConfig(**{**TINY, "head_dim": 32}, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def boot(engine: ServerEnvironment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Boot]:
    with booting(engine, tmp_path_factory.mktemp("misbehaving")) as boot:
        yield boot


@pytest.fixture(scope="module")
def llama(make_model: MakeModel) -> Path:
    return make_model("misbehaving-llama", CONFIG)


@pytest.fixture(scope="module")
def served(boot: Boot, llama: Path) -> Served:
    """A server that all of this module's faults leave as it is."""
    return boot(llama)


@pytest.fixture(scope="module")
def windows(llama: Path) -> Windows:
    tokenizer = load_tokenizer(ModelSpec.parse(str(llama), Path()), trust_remote_code=False)
    return cut_windows(load_corpus("python-docs", Path()), tokenizer, count=8, size=64, stride=32, label="llama")


def require_nothing_captured(served: Served, cache: Path) -> None:
    assert list(cache.glob("captures/*/capture.json")) == []
    assert list(served.engine.capture_dir.iterdir()) == []


def test_a_server_behind_an_address_is_captured_as_if_booted(served: Served, windows: Windows, tmp_path: Path) -> None:
    """Without a fault the proxy changes nothing, so what follows is due to its faults."""
    with Proxy(served.handle.url).serving() as url:
        there = capture(served.engine, behind(served.subject, url), windows, tmp_path / "there", "hidden")
    here = capture(served.engine, served.subject, windows, tmp_path / "here", "hidden")
    for index in range(windows.count):
        assert there.rows(index, 0, windows.size).equal(here.rows(index, 0, windows.size))


def test_a_server_restarted_behind_our_back_is_an_error(
    boot: Boot, llama: Path, served: Served, windows: Windows, tmp_path: Path
) -> None:
    """Two servers with the same model, name and flags: the second one answers from the fourth prompt on."""
    proxy, other = Proxy(served.handle.url), boot(llama)

    def restart(body: dict[str, Any]) -> dict[str, Any]:
        if proxy.requests > 3:
            proxy.url = other.handle.url
        return body

    proxy.change = restart
    with (
        proxy.serving() as url,
        pytest.raises(CaptureError, match=r"another process answers at .* than at the beginning"),
    ):
        capture(served.engine, behind(served.subject, url), windows, tmp_path, "hidden")
    require_nothing_captured(served, tmp_path)
    other.engine.close()


def test_another_model_behind_a_url_is_an_error(
    make_model: MakeModel, served: Served, llama: Path, windows: Windows, tmp_path: Path
) -> None:
    wanted = make_model("misbehaving-noisy", CONFIG, noise=0.0005)
    subject = replace(served.subject, name=str(wanted), model=ModelSpec.parse(str(wanted), Path()))
    with pytest.raises(ServerError, match=rf"serves {llama}, and {wanted} is asked for"):
        capture(served.engine, behind(subject, served.handle.url), windows, tmp_path, "hidden")
    require_nothing_captured(served, tmp_path)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("tokens", "the server ran other token ids than it was sent"),
        ("id", "the server answered another request: chat-1"),
        ("id of the answer", "the server answered another request: chat-1"),
        ("log-probs", "they do not belong to this request"),
    ],
)
def test_what_a_proxy_changes_is_an_error(
    what: str, words: str, served: Served, windows: Windows, tmp_path: Path
) -> None:
    sglang = served.engine.kind.name == "sglang"

    def change(body: dict[str, Any]) -> dict[str, Any]:
        prompt, name = ("input_ids", "rid") if sglang else ("prompt", "request_id")
        if proxy.requests > 3 and what == "tokens":
            return {**body, prompt: [*body[prompt][:-1], 7]}
        return {**body, name: "chat-1"} if proxy.requests > 3 and what == "id" else body

    def change_answer(answer: dict[str, Any]) -> dict[str, Any]:
        if proxy.requests > 3 and what == "id of the answer":
            if sglang:
                answer["meta_info"]["id"] = "chat-1"
            else:
                answer["id"] = "cmpl-chat-1"
        if proxy.requests > 3 and what == "log-probs":
            if sglang:
                for said in answer["meta_info"]["input_token_logprobs"][1:]:
                    said[0] -= 1
            else:
                for said in answer["choices"][0]["prompt_logprobs"][1:]:
                    for one in said.values():
                        one["logprob"] -= 1
        return answer

    proxy = Proxy(served.handle.url)
    proxy.change, proxy.change_answer = change, change_answer
    with proxy.serving() as url, pytest.raises(KLDError, match=words):
        capture(served.engine, behind(served.subject, url), windows, tmp_path, "hidden")
    require_nothing_captured(served, tmp_path)
