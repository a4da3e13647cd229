"""A third engine: a scripted HTTP server that runs a tiny model with transformers, and its seams for the hook.

    python -m tiny_server --model DIR --port N

It is started by the real pool and asked by the real client, with the real recorder in it. The file that TINY_FAULT
names spoils it: `no-hook` passes the hook by, `lost-row` tells the recorder of one row too many, `odd-answer` answers
without log-probs.
"""

from __future__ import annotations

import argparse
import json
import os
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_kld.hook import put_in

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_kld.hook.handshake import ServerDescription
    from pytest_kld.hook.recorder import Recorder

PACKAGES = ("transformers", "torch")


def fault() -> str:
    return Path(os.environ["TINY_FAULT"]).read_text()


def install() -> None:
    """Put the hook in; the server calls it, as an engine calls its plugins."""
    put_in(_hook)


def why_not_hooked() -> str | None:
    return None


def options() -> None:
    return None


class Model:
    """A causal language model that prefills in chunks."""

    def __init__(self, directory: str) -> None:
        from transformers import Qwen3ForCausalLM

        self.directory = directory
        self.network: Any = Qwen3ForCausalLM.from_pretrained(directory).eval()

    def log_probs(self, request_id: str, ids: list[int], chunk: int) -> list[float | None]:
        """Return log p of each token, given those before it."""
        import torch

        cache, logits = None, []
        with torch.inference_mode():
            for start in range(0, len(ids), chunk):
                hidden, cache = self.forward(request_id, start, torch.tensor(ids[start : start + chunk]), cache)
                logits.append(self.network.lm_head(hidden))
        said = torch.cat(logits).log_softmax(-1)
        return [None, *(float(said[position, token]) for position, token in enumerate(ids[1:]))]

    def forward(self, _request_id: str, start: int, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Run one chunk; return hidden states [tokens, H] and the cache."""
        print(f"prefill of {len(ids)} tokens at {start}", flush=True)
        output = self.network.model(input_ids=ids[None], past_key_values=cache, use_cache=True)
        return output.last_hidden_state[0], output.past_key_values


def _hook(recorder: Recorder) -> None:
    from pytest_kld.hook.recorder import PassDescription, Segment

    original = Model.forward

    def forward(model: Model, request_id: str, start: int, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        rows = len(ids) + (fault() == "lost-row")
        if fault() == "no-hook":
            return original(model, request_id, start, ids, cache)
        segment = Segment(request_id=request_id, first_row=0, rows=rows, position=start, token_ids=ids)
        with recorder.forward_pass([request_id], lambda: PassDescription(rank=0, segments=[segment])):
            hidden, cache = original(model, request_id, start, ids, cache)
            recorder.begin_logits(lambda: _describe(model))
            recorder.take_block(hidden, lambda wanted: model.network.lm_head(hidden[wanted]))
            recorder.end_logits()
        return hidden, cache

    Model.forward = forward  # type: ignore[method-assign]


def _describe(model: Model) -> ServerDescription:
    from pytest_kld.hook.handshake import ServerDescription
    from pytest_kld.hook.head import describe_head, head_part

    config, head = model.network.config, model.network.lm_head
    return ServerDescription(
        engine="tiny",
        version="1",
        device="cpu",
        model_names=(model.directory,),
        model_class=type(model.network).__name__,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        dtype=str(model.network.dtype).removeprefix("torch."),
        quantization=None,
        head=describe_head(head),
        head_ranks=1,
        head_part=lambda: head_part(head, 0),
        arguments={},
    )


class Handler(BaseHTTPRequestHandler):
    model: Model

    def do_GET(self) -> None:
        self.answer({})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = self.model.log_probs(body["id"], body["tokens"], body["chunk"])
        answer = {"id": body["id"], "tokens": body["tokens"], "said": said}
        self.answer({"id": body["id"]} if fault() == "odd-answer" else answer)

    def answer(self, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    install()
    Handler.model = Model(options.model)
    HTTPServer(("127.0.0.1", options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
