"""A third engine: a scripted HTTP server that runs a tiny model with transformers, and its seams for the hook.

    python -m tiny_server --model DIR --port N

It is started by the real pool and asked by the real client, with the real recorder in it. The file that TINY_FAULT
names spoils it: `no-hook` passes the hook by, `lost-row` tells the recorder of one row too many, `odd-answer` answers
without log-probs. When it decodes, `one-by-one` runs each sequence alone, `own-token` goes on with a token of its own,
`retract` prefills again in the middle, `mixed` prefills another sequence beside them, and `graph` does not show the
head's input. Others take their time: `slow` runs
each chunk in 0.1 s, `late` writes its files 2 s after its answers, `hang` never answers a window, and `drip` answers a
byte at a time. `floods` prints a line of 100 MB for each chunk, and `grows` takes a gigabyte of memory. `noisy` makes
each process compute other hidden states, always the same ones until it ends.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_kld.hook import put_in
from pytest_kld.hook.protocol import CAPTURE_DIR_VARIABLE
from pytest_kld.hook.writer import Piece

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_kld.hook.handshake import ServerDescription
    from pytest_kld.hook.recorder import Recorder

PACKAGES = ("transformers", "torch")
NOISE = 0.01
"""The deviation of the factors by which a noisy process is off."""


def fault() -> str:
    return Path(os.environ["TINY_FAULT"]).read_text()


def install() -> None:
    """Put the hook in; the server calls it, as an engine calls its plugins."""
    put_in(_hook)
    write = Piece.write

    def write_late(piece: Piece) -> None:
        time.sleep(2 if fault() == "late" else 0)
        write(piece)

    Piece.write = write_late  # type: ignore[method-assign]


def why_not_hooked() -> str | None:
    return None


def options() -> None:
    return None


class Model:
    """A causal language model that prefills in chunks."""

    def __init__(self, directory: str, dtype: str) -> None:
        from transformers import Qwen3ForCausalLM

        self.directory = directory
        self.network: Any = Qwen3ForCausalLM.from_pretrained(directory, dtype=dtype).eval()
        self.noise: Any = None

    def as_computed_here(self, hidden: Tensor) -> Tensor:
        """Return hidden states [..., H] as this process computes them: differently each time it is booted, if noisy."""
        import torch

        if fault() != "noisy":
            return hidden
        if self.noise is None:
            self.noise = NOISE * torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(os.getpid()))
        return hidden * (1 + self.noise)

    def log_probs(self, request_id: str, ids: list[int], chunk: int) -> list[float | None]:
        """Return log p of each token, given those before it."""
        import torch

        cache, logits = None, []
        with torch.inference_mode():
            for start in range(0, len(ids), chunk):
                hidden, cache = self.forward(request_id, start, torch.tensor(ids[start : start + chunk]), cache)
                logits.append(self.network.lm_head(hidden))
        said = torch.cat(logits).float().log_softmax(-1)
        return [None, *(float(said[position, token]) for position, token in enumerate(ids[1:]))]

    def forward(self, _request_id: str, start: int, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Run one chunk; return hidden states [tokens, H] and the cache."""
        print(f"prefill of {len(ids)} tokens at {start}", flush=True)
        if fault() == "slow":
            time.sleep(0.1)
        if fault() == "grows":
            self.grown = bytearray(1_000_000_000)
        if fault() == "floods":
            print("x" * 100_000_000, flush=True)
        output = self.network.model(input_ids=ids[None], past_key_values=cache, use_cache=True)
        return self.as_computed_here(output.last_hidden_state[0]), output.past_key_values

    def decode(self, ids: list[str], prompts: list[list[int]], count: int) -> list[list[int]]:
        """Decode all sequences together, the most probable token at each step."""
        import torch

        batch, cache, decoded = torch.tensor(prompts), None, []
        with torch.inference_mode():
            for step in range(count):
                output = self.network.model(input_ids=batch, past_key_values=cache, use_cache=True)
                cache, hidden = output.past_key_values, self.as_computed_here(output.last_hidden_state[:, -1])
                position = len(prompts[0]) - 1 + step
                batch = self.sample(ids, position, batch[:, -1], hidden, self.network.lm_head(hidden))[:, None]
                decoded.append(batch[:, 0].tolist())
        return [list(tokens) for tokens in zip(*decoded, strict=True)]

    def sample(self, _ids: list[str], _position: int, _tokens: Tensor, _hidden: Tensor, logits: Tensor) -> Tensor:
        """Return the next token of each sequence [B]."""
        return logits.argmax(-1)


def _hook(recorder: Recorder) -> None:
    from pytest_kld.hook.decoder import Step
    from pytest_kld.hook.recorder import PassDescription, Segment

    original = Model.forward

    def forward(model: Model, request_id: str, start: int, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        rows = len(ids) + (fault() == "lost-row")
        if fault() == "no-hook":
            return original(model, request_id, start, ids, cache)
        position = start + (8 if fault() == "prefix-cache" else 0)
        segment = Segment(request_id=request_id, first_row=0, rows=rows, position=position, token_ids=ids)
        with recorder.forward_pass([request_id], lambda: PassDescription(rank=0, segments=[segment])):
            hidden, cache = original(model, request_id, start, ids, cache)
            recorder.begin_logits(lambda: _describe(model))
            recorder.take_block(hidden, lambda wanted: model.network.lm_head(hidden[wanted]))
            recorder.end_logits()
        return hidden, cache

    Model.forward = forward  # type: ignore[method-assign]
    sample_only = Model.sample

    def sample(model: Model, ids: list[str], position: int, ran: Tensor, hidden: Tensor, logits: Tensor) -> Tensor:
        decoding = [position > 15 and not (fault() == "retract" and position == 30)] * len(ids)
        beside = [False] * (fault() == "mixed" and position == 30)
        recorder.decoder.begin(ids)
        if fault() != "graph":
            recorder.decoder.see_hidden(hidden)
        positions = [position] * (len(ids) + len(beside))
        step = Step(rank=0, positions=positions, decoding=decoding + beside, token_ids=ran, logits=logits)
        forced = recorder.decoder.take(ids, lambda: step)
        tokens = sample_only(model, ids, position, ran, hidden, logits.square_())  # logits are no longer needed
        for request, token in forced:
            tokens[request] = 0 if fault() == "own-token" and position == 40 else token
        return tokens

    Model.sample = sample  # type: ignore[method-assign]


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
        self.answer({"pid": os.getpid(), "capturing": CAPTURE_DIR_VARIABLE in os.environ})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/decode":
            alone = fault() == "one-by-one"
            groups = [[place] for place in range(len(body["ids"]))] if alone else [list(range(len(body["ids"])))]
            decoded = [
                tokens
                for group in groups
                for tokens in self.model.decode(
                    [body["ids"][place] for place in group], [body["prompts"][place] for place in group], body["count"]
                )
            ]
            self.answer({"decoded": list(zip(body["ids"], decoded, strict=True))})
            return
        if fault() == "hang" and len(body["tokens"]) > 2:
            time.sleep(600)
        said = self.model.log_probs(body["id"], body["tokens"], body["chunk"])
        if (fault() == "no-nan" and any(value != value for value in said[1:])) or fault() == "always-nan":
            self.answer("cannot write nan", 500)
            return
        answer = {"id": body["id"], "tokens": body["tokens"], "said": said}
        self.answer({"id": body["id"]} if fault() == "odd-answer" else answer)

    def answer(self, value: object, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault() == "drip" and self.command == "POST":
            for byte in data:
                self.wfile.write(bytes([byte]))
                time.sleep(0.1)
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--a", help="changes nothing, so that there are different servers of one model")
    parser.add_argument("--moe-runner-backend", help="changes nothing either")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    install()
    Handler.model = Model(options.model, options.dtype)
    HTTPServer(("127.0.0.1", options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
