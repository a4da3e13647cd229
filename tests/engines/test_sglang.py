"""The real SGLang: captures through the hook, and what becomes of them when something goes wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests
import torch
from conftest import TINY, MakeModel
from sglang_cpu.environment import SGLangEnvironment, variables
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen3Config

from pytest_kld.captures.cache import Cache
from pytest_kld.captures.capture import Capture
from pytest_kld.captures.recording import Recording
from pytest_kld.engines import Prefill
from pytest_kld.engines.served.client import ServedModel
from pytest_kld.engines.served.engine import ServedEngine
from pytest_kld.engines.served.kind import Settings
from pytest_kld.engines.served.pool import ServerPool
from pytest_kld.engines.sglang.kind import KIND
from pytest_kld.errors import CaptureError, ServerError
from pytest_kld.hook.protocol import CaptureRequest, new_run, request_id, write_json_whole
from pytest_kld.kernel.head import check_head
from pytest_kld.progress import Silent
from pytest_kld.subjects.model import ModelSpec
from pytest_kld.subjects.subject import Subject
from pytest_kld.text.corpus import load_corpus
from pytest_kld.text.windows import Windows, cut_windows, load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.sglang]

SIZE = 256
CHUNK = 256
"""Rows of which SGLang makes its own log-probs at a time, as pytest-kld boots it."""
ROWS = [SIZE // 2, SIZE - 1]
Boot = Callable[..., "Served"]


class Served:
    """A booted server with the engine that booted it."""

    def __init__(self, engine: ServedEngine, subject: Subject) -> None:
        self.engine, self.subject = engine, subject
        self.handle = engine.servers.get(subject.spec, subject.arguments["args"], subject.environment)

    @contextmanager
    def connected(self) -> Iterator[ServedModel]:
        with self.engine.open(self.subject) as loaded:
            yield loaded

    def capture(self, windows: Windows, rows: Sequence[int] | None = ROWS) -> list[Prefill]:
        with self.connected() as loaded:
            return sorted(loaded.prefill(windows, range(windows.count), rows), key=lambda prefill: prefill.window)

    @property
    def log(self) -> str:
        return self.handle.log.read_text(errors="replace")


@pytest.fixture
def boot(environment: SGLangEnvironment, tmp_path: Path) -> Iterator[Boot]:
    with booting(environment, tmp_path) as boot:
        yield boot


@contextmanager
def booting(environment: SGLangEnvironment, directory: Path) -> Iterator[Boot]:
    """Yield a function that boots a server for a model; all are gone afterwards."""
    pools = []

    def boot(model: Path, *flags: str, **env: str) -> Served:
        pool = ServerPool(
            kind=KIND,
            command=(str(environment.python), "-m", "sglang.launch_server"),
            capture_dir=directory / "spool",
            log_dir=directory / "logs",
            startup_timeout=600,
            settings=Settings(device="cpu"),
            progress=Silent(),
        )
        pools.append(pool)
        engine = ServedEngine(servers=pool, capture_dir=directory / "spool", api_key=None)
        subject = Subject(
            name=str(model),
            model=ModelSpec.parse(str(model), Path()),
            engine="sglang",
            arguments={"args": [*environment.flags, *flags]},
            environment={**environment.variables, **env},
        )
        return Served(engine, subject)

    try:
        yield boot
    finally:
        for pool in pools:
            pool.close()


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
    return served.capture(text)


def assert_same(ours: list[Prefill], theirs: list[Prefill]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.window == other.window
        assert torch.equal(one.logits, other.logits)
        if one.hidden is not None and other.hidden is not None:
            assert torch.equal(one.hidden, other.hidden)


def mean_kl(p_logits: torch.Tensor, q_logits: torch.Tensor) -> float:
    p, q = (z.double().log_softmax(-1) for z in (p_logits, q_logits))
    return float((p.exp() * (p - q)).sum(-1).mean())


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
    assert_same(served.capture(text), captured)


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
        assert_same(served.capture(text), captured)
    finally:
        stop.set()
        thread.join()
    assert sent


def test_nothing_is_left_in_the_capture_directory(served: Served, captured: list[Prefill]) -> None:
    assert captured
    assert list(served.engine.capture_dir.iterdir()) == []


def test_a_broken_run_is_an_error_here_and_the_server_lives(served: Served, text: Windows) -> None:
    with served.connected() as loaded, loaded._run(CaptureRequest(hidden=True, rows=(1,))) as run:
        (run / "request.json").write_text("{ this is not JSON")
        with pytest.raises(CaptureError, match=r"the hook failed in the server:[\s\S]*JSONDecodeError"):
            loaded._window(run, CaptureRequest(hidden=True, rows=(1,)), 0, text.token_ids[0])
    assert served.capture(text)


def test_a_request_that_the_server_refuses_is_an_error_that_quotes_it(served: Served, text: Windows) -> None:
    too_long = Windows(**{**_fields(text), "token_ids": np.tile(text.token_ids, 3)})
    with pytest.raises(ServerError, match="the server answered 400"):
        served.capture(too_long)


def test_batches_chunked_prefill_and_chunked_logits_are_put_together(
    boot: Boot, llama_dir: Path, text: Windows, captured: list[Prefill]
) -> None:
    served = boot(
        llama_dir,
        *("--prefill-max-requests", "3", "--chunked-prefill-size", "160"),
        SGLANG_LOGPROB_CHUNK_SIZE="50",
    )
    batched = served.capture(text)
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
    with served.connected() as loaded, loaded._run(CaptureRequest(hidden=True, rows=tuple(ROWS))) as run:
        body = {
            "input_ids": [text.token_ids[i].tolist() for i in (0, 1, 2)],
            "rid": [request_id(run.name, 0), "somebody-else", request_id(run.name, 2)],
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        requests.post(f"{served.handle.url}/generate", json=body, timeout=60).raise_for_status()
        for window in (0, 2):
            pieces = loaded._pieces(run, window, SIZE)
            hidden = torch.cat([piece["hidden"] for piece in pieces])
            expected = captured[window].hidden
            assert expected is not None
            assert (hidden.float() - expected.float()).abs().max() < 0.1
        assert not list(run.glob("1.*"))


def test_two_ranks_write_one_capture(boot: Boot, make_model: MakeModel, text: Windows) -> None:
    config = Qwen3Config(**{**TINY, "vocab_size": 1025}, tie_word_embeddings=False)
    served = boot(make_model("odd", config), "--tp", "2", SGLANG_CPU_OMP_THREADS_BIND="0|1", OMP_NUM_THREADS="1")
    captured = served.capture(text)
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
    assert {prefill.logits.dtype for prefill in served.capture(text)} == {torch.float32}
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


def test_a_draft_model_never_reaches_a_capture(boot: Boot, make_model: MakeModel, text: Windows) -> None:
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


def test_a_server_without_the_hook_is_an_error_that_says_how_to_put_it_in(
    boot: Boot, llama_dir: Path, environment: SGLangEnvironment
) -> None:
    served = boot(llama_dir, SGLANG_PLUGINS="none-of-these")
    with pytest.raises(ServerError, match="the server answered and the hook did not") as caught, served.connected():
        pass
    assert "PYTEST_KLD_CAPTURE_DIR" in str(caught.value)
    assert str(served.handle.log) in str(caught.value)
    assert environment.python.name


def test_an_unknown_flag_is_an_error_with_log_and_advice(boot: Boot, llama_dir: Path) -> None:
    with pytest.raises(ServerError, match="ended with exit code 2 before it was ready") as caught:
        boot(llama_dir, "--no-such-flag")
    assert "unrecognized arguments: --no-such-flag" in str(caught.value)
    assert "hint: this release of SGLang does not know one of the flags" in str(caught.value)


def test_sglang_without_the_hook_installed_is_an_error_before_anything_boots(
    environment: SGLangEnvironment, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    bare = SGLangEnvironment(python=environment.python, variables=variables(tmp_path))
    with booting(bare, tmp_path) as boot, pytest.raises(ServerError, match="pip install pytest-kld"):
        boot(llama_dir)


def test_a_server_that_dies_in_the_middle_is_an_error_with_its_log(boot: Boot, llama_dir: Path, text: Windows) -> None:
    served = boot(llama_dir)
    tree = [psutil.Process(served.handle.pid), *psutil.Process(served.handle.pid).children(recursive=True)]
    (scheduler,) = [process for process in tree if "scheduler" in " ".join(process.cmdline())]
    with served.connected() as loaded:
        prefills = loaded.prefill(text, range(text.count), ROWS)
        next(prefills)
        scheduler.kill()
        with pytest.raises(ServerError, match=r"does not answer|answered 5") as caught:
            list(prefills)
    assert str(served.handle.log) in str(caught.value)
    served.engine.close()
    assert all(not process.is_running() or process.status() == psutil.STATUS_ZOMBIE for process in tree)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
def test_no_server_outlives_pytest(
    number: signal.Signals, pytester: pytest.Pytester, environment: SGLangEnvironment, llama_dir: Path
) -> None:
    pytester.makepyfile("""
        import time
        def test_serves(kld_server, request):
            handle = kld_server(request.config.getoption("--kld-ref"))
            print("\\nSERVING", handle.pid, flush=True)
            time.sleep(600)
    """)
    command = [
        *(sys.executable, "-m", "pytest", "-s", f"--kld-ref={llama_dir}", *environment.options()),
        f"--kld-cache-dir={pytester.path / 'cache'}",
    ]
    with subprocess.Popen(command, cwd=pytester.path, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        pid = next(int(line.split()[1]) for line in run.stdout if line.startswith("SERVING"))
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        assert len(tree) > 3
        run.send_signal(number)
        run.stdout.read()
    _, alive = psutil.wait_procs(tree, timeout=40)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def test_a_running_server_with_a_key_is_used_by_its_url(
    pytester: pytest.Pytester, environment: SGLangEnvironment, llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two servers by URL is what a cluster gives; here one server is both sides, so KL is exactly 0."""
    shared = pytester.path / "shared"
    shared.mkdir()
    log = pytester.path / "server.log"
    from pytest_kld.servers.server import Server, ServerCommand, free_port

    port = free_port()
    server = Server(
        ServerCommand(
            argv=[
                *(str(environment.python), "-m", "sglang.launch_server", "--model-path", str(llama_dir)),
                *("--host", "127.0.0.1", "--port", str(port), "--api-key", "secret", *environment.flags),
            ],
            environment={**os.environ, **environment.variables, "PYTEST_KLD_CAPTURE_DIR": str(shared)},
            url=f"http://127.0.0.1:{port}",
            health="/health",
            log=log,
            startup_timeout=600,
        )
    )
    report = pytester.path / "report.json"
    options = [
        *(f"--kld-ref={llama_dir}", f"--kld-candidate={llama_dir}", f"--kld-ref-url={server.url}"),
        *(f"--kld-candidate-url={server.url}", f"--kld-capture-dir={shared}", "--kld-max-mean=0.01"),
        *("--kld-dataset=python-docs", "--kld-windows=2", "--kld-window-size=64", "--kld-stride=64"),
        *(f"--kld-cache-dir={pytester.path / 'cache'}", f"--kld-json={report}"),
    ]
    try:
        without_key = pytester.runpytest_subprocess(*options)
        without_key.assert_outcomes(errors=1)
        without_key.stdout.fnmatch_lines(["*--kld-api-key-env*"])
        monkeypatch.setenv("THE_KEY", "secret")
        with_key = pytester.runpytest_subprocess(*options, "--kld-api-key-env=THE_KEY")
        with_key.assert_outcomes(passed=1)
    finally:
        server.stop()
    text = report.read_text()
    assert json.loads(text)["results"][0]["figures"]["mean"] == 0.0
    assert "secret" not in text


def _fields(windows: Windows) -> dict[str, Any]:
    return {name: getattr(windows, name) for name in windows.__slots__}
