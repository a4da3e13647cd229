"""A server that runs already: what it tells of itself is in the cache key, but for a few named fields."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from pytest_kld.engines.sglang.description import server_description

TOLD: dict[str, Any] = {
    "version": "0.5.23",
    "model_path": "/models/m",
    "max_prefill_tokens": 16384,
    "disable_cuda_graph": False,
    "kv_cache_dtype": "auto",
    "tokenizer_path": "/models/m",
    "enable_tokenizer_batch_encode": False,
    "skip_tokenizer_init": False,
    "num_reserved_decode_tokens": 512,
    "cuda_graph_config": {"prefill": {"backend": "full"}},
    "quantization": None,
    "random_seed": 17,
    "port": 30000,
    "api_key": "hunter2",
    "internal_states": [{"memory": 1}],
    "max_total_num_tokens": 40_000,
}


@contextmanager
def telling(told: dict[str, Any]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = json.dumps(told).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def described(**changes: Any) -> dict[str, Any]:
    with telling({**TOLD, **changes}) as url:
        return server_description(url, "hunter2")


@pytest.mark.parametrize(
    "change",
    [
        {"max_prefill_tokens": 8192},
        {"enable_tokenizer_batch_encode": True},
        {"num_reserved_decode_tokens": 256},
        {"tokenizer_path": "/models/other"},
        {"cuda_graph_config": {"prefill": {"backend": "disabled"}}},
        {"quantization": "fp8"},
        {"a_field_of_tomorrow": [1]},
        {"version": "0.5.24"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_field_is_in_the_key(change: dict[str, Any]) -> None:
    assert described(**change) != described()


def test_what_changes_with_each_start_and_what_is_secret_is_not() -> None:
    restarted = described(random_seed=3, port=1, internal_states=[], max_total_num_tokens=39_999, api_key="hunter22")
    assert restarted == described()


def test_text_that_holds_the_key_is_a_digest() -> None:
    told = described(extra=["--api-key=hunter2"], more={"header": "Bearer hunter2"})
    assert "hunter2" not in json.dumps(told)
    assert told != described(extra=["--api-key=hunter2 "], more={"header": "Bearer hunter2"})
