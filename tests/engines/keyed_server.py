"""The tiny server as vLLM would answer, to those alone who send its key: python -m keyed_server KEYFILE --model DIR …

What it answers to others quotes all that they sent, as careless servers do. So does a window if KEYFILE.quote exists.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny_server

KEYFILE = Path(sys.argv.pop(1))
describe = tiny_server._describe


class Handler(tiny_server.Handler):
    def do_GET(self) -> None:  # noqa: N802
        if self.path == "/version" and self.knows():
            self.answer({"version": "0.32.0"})

    def do_POST(self) -> None:  # noqa: N802
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.knows():
            return
        ids, rid = body["prompt"], body["request_id"]
        if KEYFILE.with_suffix(".quote").exists():
            self.answer({"error": str(self.headers)}, 500)
            return
        said = self.model.log_probs(rid, ids, 1000)
        told: list[Any] = [None if p is None else {str(t): {"logprob": p}} for p, t in zip(said, ids, strict=True)]
        choice = {"prompt_token_ids": ids, "prompt_logprobs": told}
        self.answer({"id": f"cmpl-{rid}", "choices": [choice], "usage": {"prompt_tokens": len(ids)}})

    def knows(self) -> bool:
        if self.headers["Authorization"] == f"Bearer {KEYFILE.read_text()}":
            return True
        self.answer({"error": f"unknown key in {self.headers}"}, 401)
        return False


if __name__ == "__main__":
    tiny_server._describe = lambda model: replace(describe(model), engine="vllm")
    tiny_server.Handler = Handler  # type: ignore[misc]
    tiny_server.main()
