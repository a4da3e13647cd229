"""A proxy before a server, which may change requests and answers, and send them elsewhere."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import requests

from pytest_kld.subjects.subject import Subject

Change = Callable[[dict[str, Any]], dict[str, Any]]


class Proxy:
    """A proxy that changes nothing until it is told to.

    Attributes:
        url: where requests are sent.
        requests: how many prompts were sent.
        change: makes what is sent of what came.
        change_answer: makes what is answered of what the server said.

    """

    def __init__(self, url: str) -> None:
        self.url, self.requests = url, 0
        self.change: Change = lambda body: body
        self.change_answer: Change = lambda answer: answer

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Yield the proxy's address."""
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(requests.get(f"{proxy.url}{self.path}", timeout=60))

            def do_POST(self) -> None:
                proxy.requests += 1
                body = proxy.change(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                told = requests.post(f"{proxy.url}{self.path}", json=body, timeout=60)
                self.answer(told, json.dumps(proxy.change_answer(told.json())).encode())

            def answer(self, told: requests.Response, data: bytes | None = None) -> None:
                data = told.content if data is None else data
                self.send_response(told.status_code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_address[1]}"
            server.shutdown()


def behind(subject: Subject, url: str) -> Subject:
    """Return the same model behind an address."""
    return replace(subject, arguments={"url": url}, environment={})
