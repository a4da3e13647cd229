"""A served model: sends windows to a hooked server and assembles what the hook wrote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pytest_kld.engines import ModelFacts, Prefill, Routing
from pytest_kld.engines.served.agreement import check_agreement
from pytest_kld.engines.served.connection import HANDSHAKE, Connection
from pytest_kld.engines.served.decoding import decode
from pytest_kld.engines.served.experts import experts_told
from pytest_kld.engines.served.handshake import read_handshake
from pytest_kld.engines.served.kind import Answer
from pytest_kld.engines.served.pieces import first_row, join, narrow, reaches, read_piece
from pytest_kld.errors import CaptureError, ServerError
from pytest_kld.hook.protocol import (
    HANDSHAKE_FILE,
    ORIGIN,
    CaptureRequest,
    head_file,
    request_id,
)
from pytest_kld.kernel.head import Head

if TYPE_CHECKING:
    from pytest_kld.engines.served.kind import ServerKind
    from pytest_kld.engines.served.pool import ServerHandle, ServerPool
    from pytest_kld.subjects.model import ModelSpec
    from pytest_kld.text.windows import Windows

T = TypeVar("T")

_IN_FLIGHT = {True: 4, False: 2}
"""Concurrent requests for hidden states (True) and for logits (False): the server is never idle, memory is bounded."""
_GREETING = (0, 1)
"""Token ids of the request that makes the hook write the handshake."""


@dataclass(slots=True, kw_only=True)
class ServedModel(Connection):
    """A model on a server that answered the handshake. See `LoadedModel`."""

    _heads: list[Head] | None = None
    _told: bool = False
    _unobserved: str | None = None

    @classmethod
    def connect(
        cls,
        kind: ServerKind,
        url: str,
        *,
        model: ModelSpec,
        pool: ServerPool | None,
        server: ServerHandle | None,
        capture_dir: Path,
        api_key: str | None,
    ) -> ServedModel:
        """Send one short request and read the handshake.

        Raises:
            ServerError: the server does not answer, lacks the hook or has another version of it, or serves another
                model.

        """
        served = cls(
            kind=kind,
            url=url,
            label=model.label,
            capture_dir=capture_dir,
            api_key=api_key,
            pool=pool,
            server=server,
        )
        with served.run(CaptureRequest(hidden=True)) as run:
            served._ask(run, 0, _GREETING)
            path = run / HANDSHAKE_FILE
            served.wait_for(run, path.is_file, HANDSHAKE)
            served.handshake = read_handshake(path, url)
        served._check_handshake(model)
        return served

    @property
    def facts(self) -> ModelFacts:
        """The facts of the loaded model."""
        told = self.handshake
        return ModelFacts(
            model_class=told["model_class"],
            vocab_size=told["vocab_size"],
            hidden_size=told["hidden_size"],
            context_length=None,  # the server rejects windows that are too long
            dtype=told["dtype"],
            quantization=told["quantization"],
        )

    @property
    def routing(self) -> Routing | None:
        """How it routes tokens to experts. See `LoadedModel.routing`."""
        told = self.handshake["routing"]
        if told is None:
            return None
        why = told["unobserved"] or self._unobserved
        return Routing(layers=tuple(told["layers"]), experts=told["experts"], unobserved=why)

    @property
    def origin(self) -> str:
        """The server's process, as its hook names it. See `LoadedModel.origin`."""
        return str(self.handshake[ORIGIN])

    @property
    def runtime(self) -> dict[str, Any]:
        """What the server chose for itself. See `LoadedModel.runtime`."""
        return dict(self.handshake["arguments"])

    @property
    def heads(self) -> list[Head]:
        """The head, assembled from all ranks; empty if it is not a plain product."""
        if self._heads is None:
            self._heads = [self._fetch_head()] if self.handshake["head"]["plain"] else []
        return self._heads

    def prefill(self, windows: Windows, indices: Sequence[int], rows: Sequence[int] | None) -> Iterator[Prefill]:
        """Run windows, several in flight, and yield them as they complete. See `LoadedModel.prefill`.

        A server that would put several into a batch gets one at a time, so that a repeat is bit-identical.
        """
        request = CaptureRequest(hidden=rows is not None, rows=tuple(rows or ()))
        waiting = iter(indices)
        alone = self.kind.runs_one_at_a_time(self.handshake["arguments"])
        in_flight = _IN_FLIGHT[request.hidden] if alone else 1
        with self.run(request) as run, ThreadPoolExecutor(in_flight) as executor:
            pending: set[Future[Prefill]] = set()

            def submit() -> None:
                index = next(waiting, None)
                if index is not None:
                    pending.add(executor.submit(self._window, run, request, index, windows.token_ids[index]))

            try:
                for _ in range(in_flight):
                    submit()
                while pending:
                    done, _ = wait(pending, return_when=FIRST_COMPLETED)
                    for future in done:
                        pending.remove(future)
                        submit()
                        yield future.result()
            finally:
                for future in pending:
                    future.cancel()

    def decode(self, windows: Windows, indices: Sequence[int], rows: Sequence[int] | None) -> Iterator[Prefill]:
        """Run windows, a batch at a time. See `LoadedModel.decode`."""
        for one in decode(self, windows, indices, rows):
            yield replace(one, experts=self._if_told(one.window, one.experts))

    def _window(self, run: Path, request: CaptureRequest, index: int, token_ids: np.ndarray[Any, Any]) -> Prefill:
        answer = self._ask(run, index, token_ids.tolist())
        pieces = self.pieces(run, index, len(token_ids))
        if not torch.equal(join(pieces, "token_ids").to(torch.int32), torch.from_numpy(token_ids)):
            raise CaptureError(f"{self.label}, window {index}: the server ran other token ids than it was sent")
        logits = narrow(join(pieces, "logits"), getattr(torch, self.handshake["dtype"]))
        positions = torch.cat([p["rows"] for p in pieces]).tolist() if request.hidden else list(range(len(token_ids)))
        if len(logits) != len(positions) or (request.hidden and tuple(positions) != request.rows):
            raise CaptureError(f"{self.label}, window {index}: the hook wrote other rows than were asked for")
        hidden = join(pieces, "hidden") if request.hidden else None
        check_agreement(f"{self.label}, window {index}", answer, token_ids, positions, hidden, logits)
        for path in run.glob(f"{index}.*.safetensors"):
            path.unlink()
        return Prefill(window=index, hidden=hidden, logits=logits, experts=self._experts(index, pieces, answer))

    def _experts(self, index: int, pieces: list[dict[str, Tensor]], answer: Answer) -> Tensor | None:
        """Return the experts of a window's positions, from the hook or from the answer.

        None if the model is dense or nothing tells them.

        Raises:
            CaptureError: those of other windows were told, or the answer cannot be read.

        """
        found = None
        if all("experts" in piece for piece in pieces):
            found = join(pieces, "experts")
        elif answer.experts is not None and self.routing is not None and self.routing.unobserved is None:
            per_token = self.handshake["routing"]["per_token"]
            found = experts_told(answer.experts, self.routing, per_token, f"{self.label}, window {index}")
        return self._if_told(index, found)

    def _if_told(self, index: int, found: Tensor | None) -> Tensor | None:
        """Return the experts of a window that were told; None if the model is dense or no window's are told."""
        if self.routing is None or self.routing.unobserved is not None:
            return None
        if found is None and self._told:
            raise CaptureError(
                f"{self.label}, window {index}: the server did not tell its experts, as of other windows"
            )
        self._told = found is not None
        if found is None:
            self._unobserved = (
                "the server's passes do not show them, as if layers ran in a CUDA graph or compiled. With "
                "--enable-return-routed-experts among its flags its answers may tell them"
            )
        return found

    def _ask(self, run: Path, index: int, token_ids: Sequence[int]) -> Answer:
        rid = request_id(run.name, index)
        path, body = self.kind.request(rid, token_ids)
        count = len(token_ids)

        def stands_for(text: str) -> Answer | None:
            if self.kind.not_finite and self.kind.not_finite in text:
                return Answer(request_id=rid, prompt_tokens=count, log_probs=(), unwritten=True)
            return None

        what = f"{self.label}, window {index}"
        answer = self.post(path, body, self.kind.read_answer, what, stands_for)
        fits = answer.unwritten or len(answer.log_probs) >= count
        if answer.request_id != rid or answer.prompt_tokens != count or not fits:
            raise self.failure(
                f"{what}: the server answered another request: {answer.request_id} with {answer.prompt_tokens} tokens "
                f"and {len(answer.log_probs)} log-probs, and {rid} has {count} tokens"
            )
        return answer

    def _fetch_head(self) -> Head:
        vocab_size = self.handshake["vocab_size"]
        with self.run(CaptureRequest(hidden=True, head=True)) as run:
            self._ask(run, 0, _GREETING)
            ranks = self.handshake["head_ranks"]
            parts: dict[int, Path] = {}

            def complete() -> bool:
                for rank in range(ranks):
                    path = run / head_file(rank)
                    if path.is_file() and path not in parts.values():
                        parts[first_row(path)] = path
                return reaches(parts, vocab_size)

            self.wait_for(run, complete, "the head")
            self.require_origin(read_handshake(run / HANDSHAKE_FILE, self.url)[ORIGIN], "the head")
            tensors = [read_piece(parts[start], "weight") for start in sorted(parts)]
        head = self.handshake["head"]
        return Head(
            weight=join(tensors, "weight"),
            bias=join(tensors, "bias") if "bias" in tensors[0] else None,
            scale=float(head["scale"]),
            softcap=None if head["softcap"] is None else float(head["softcap"]),
        )

    def _check_handshake(self, model: ModelSpec) -> None:
        told = self.handshake
        if told["engine"] != self.kind.name:
            raise ServerError(
                f"the server {self.url} is {told['engine']}, and {self.kind.name} is asked for: see --kld-engine."
            )
        if told["refusal"] is not None:
            raise ServerError(f"the server {self.url} cannot be captured: {told['refusal']}.")
        names = {name.rstrip("/") for name in told["model_names"]}
        if not any(_same_model(model, name) for name in names):
            raise ServerError(
                f"the server {self.url} serves {', '.join(sorted(names))}, and {model.label} is asked for. If they are "
                "the same, start it with --served-model-name set to that."
            )


def _same_model(model: ModelSpec, served: str) -> bool:
    """Tell whether a server's name for its model matches: the same path or id, or the same one under another mount."""
    mine = model.source.rstrip("/")
    cached = f"models--{model.name.replace('/', '--')}"
    return served == mine or served.rsplit("/", 1)[-1] == mine.rsplit("/", 1)[-1] or cached in served.split("/")
