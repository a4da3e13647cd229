"""A served model: sends windows to a hooked server and assembles what the hook wrote."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import requests
import torch
from torch import Tensor

from pytest_kld import __version__
from pytest_kld.engines import ModelFacts, Prefill
from pytest_kld.engines.served.kind import headers
from pytest_kld.engines.served.pieces import covers, first_row, join, narrow, reaches, read_piece
from pytest_kld.errors import CaptureError, ServerError
from pytest_kld.hook.protocol import (
    CAPTURE_DIR_VARIABLE,
    HANDSHAKE_FILE,
    PROTOCOL,
    REQUEST_FILE,
    CaptureRequest,
    head_file,
    new_run,
    request_id,
    write_json_whole,
)
from pytest_kld.kernel.head import Head

if TYPE_CHECKING:
    from pytest_kld.engines.served.kind import Answer, ServerKind
    from pytest_kld.engines.served.pool import ServerHandle, ServerPool
    from pytest_kld.subjects.model import ModelSpec
    from pytest_kld.text.windows import Windows

_IN_FLIGHT = {True: 4, False: 2}
"""Concurrent requests for hidden states (True) and for logits (False): the server is never idle, memory is bounded."""
_ANSWER_TIMEOUT_SECONDS = 3600
_FILE_TIMEOUT_SECONDS = 120
"""How long a file may take to appear after its answer, or after the previous file: network file systems are slow."""
_HANDSHAKE_TIMEOUT_SECONDS = 10
"""The same for the handshake of a server booted here, which is written before the answer."""
_SECONDS_BETWEEN_LOOKS = 0.01
_HANDSHAKE = "the handshake"
_GREETING = (0, 1)
"""Token ids of the request that makes the hook write the handshake."""
_SERVED_TOLERANCE = 1e-3
"""Nats by which the server's log-prob may differ from that of the captured logits, due to rounding in float32."""


@dataclass(slots=True, kw_only=True)
class ServedModel:
    """A model on a server that answered the handshake. See `LoadedModel`.

    Attributes:
        kind: the engine.
        url: the server's address.
        label: the user's name for the model.
        handshake: the hook's description of the server.
        capture_dir: the directory that both sides see.
        api_key: the server's API key, or None.
        pool: reports why our server failed; None for a server that we did not boot.
        server: the server, if we booted it.

    """

    kind: ServerKind
    url: str
    label: str
    handshake: dict[str, Any] = field(default_factory=dict)
    capture_dir: Path
    api_key: str | None
    pool: ServerPool | None
    server: ServerHandle | None
    _heads: list[Head] | None = None

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
        with served._run(CaptureRequest(hidden=True)) as run:
            served._ask(run, 0, _GREETING)
            path = run / HANDSHAKE_FILE
            served._wait_for(run, path.is_file, _HANDSHAKE)
            served.handshake = json.loads(path.read_text())
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
    def heads(self) -> list[Head]:
        """The head, assembled from all ranks; empty if it is not a plain product."""
        if self._heads is None:
            self._heads = [self._fetch_head()] if self.handshake["head"]["plain"] else []
        return self._heads

    def prefill(self, windows: Windows, indices: Sequence[int], rows: Sequence[int] | None) -> Iterator[Prefill]:
        """Run windows, several in flight, and yield them as they complete. See `LoadedModel.prefill`."""
        request = CaptureRequest(hidden=rows is not None, rows=tuple(rows or ()))
        waiting = iter(indices)
        with self._run(request) as run, ThreadPoolExecutor(_IN_FLIGHT[request.hidden]) as executor:
            pending: set[Future[Prefill]] = set()

            def submit() -> None:
                index = next(waiting, None)
                if index is not None:
                    pending.add(executor.submit(self._window, run, request, index, windows.token_ids[index]))

            try:
                for _ in range(_IN_FLIGHT[request.hidden]):
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

    def _window(self, run: Path, request: CaptureRequest, index: int, token_ids: np.ndarray[Any, Any]) -> Prefill:
        answer = self._ask(run, index, token_ids.tolist())
        pieces = self._pieces(run, index, len(token_ids))
        if not torch.equal(join(pieces, "token_ids").to(torch.int32), torch.from_numpy(token_ids)):
            raise CaptureError(f"{self.label}, window {index}: the server ran other token ids than it was sent")
        logits = narrow(join(pieces, "logits"), getattr(torch, self.handshake["dtype"]))
        positions = torch.cat([p["rows"] for p in pieces]).tolist() if request.hidden else list(range(len(token_ids)))
        if len(logits) != len(positions) or (request.hidden and tuple(positions) != request.rows):
            raise CaptureError(f"{self.label}, window {index}: the hook wrote other rows than were asked for")
        self._check_served(index, answer, token_ids, positions, logits)
        for path in run.glob(f"{index}.*.safetensors"):
            path.unlink()
        hidden = join(pieces, "hidden") if request.hidden else None
        return Prefill(window=index, hidden=hidden, logits=logits)

    def _ask(self, run: Path, index: int, token_ids: Sequence[int]) -> Answer:
        rid = request_id(run.name, index)
        path, body = self.kind.request(rid, token_ids)
        what = f"{self.label}, window {index}"
        try:
            told = requests.post(
                f"{self.url}{path}", json=body, headers=headers(self.api_key), timeout=_ANSWER_TIMEOUT_SECONDS
            )
        except requests.RequestException as error:
            raise self._failure(f"{what}: the server {self.url} does not answer: {error}") from error
        if told.status_code != requests.codes.ok:
            advice = self.kind.hint(told.text)
            quoted = told.text[:500] + (f"\nhint: {advice}" if advice else "")
            raise self._failure(f"{what}: the server answered {told.status_code}: {quoted}")
        try:
            answer = self.kind.read_answer(told.json())
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise self._failure(
                f"{what}: the server {self.url} did not answer as {self.kind.title} does "
                f"({type(error).__name__}: {error}): {told.text[:500]}"
            ) from error
        count = len(token_ids)
        if answer.request_id != rid or answer.prompt_tokens != count or len(answer.log_probs) < count:
            raise self._failure(
                f"{what}: the server answered another request: {answer.request_id} with {answer.prompt_tokens} tokens "
                f"and {len(answer.log_probs)} log-probs, and {rid} has {count} tokens"
            )
        return answer

    def _pieces(self, run: Path, index: int, count: int) -> list[dict[str, Tensor]]:
        """Wait until the pieces of a window cover it, and read them in order."""
        found: dict[int, Path] = {}

        def complete() -> bool:
            for path in run.glob(f"{index}.*.safetensors"):
                found[int(path.name.split(".")[1])] = path
            return covers(found, count)

        self._wait_for(run, complete, f"window {index}")
        pieces, position = [], 0
        for start in sorted(found):
            if start < position:
                continue  # the prefill was restarted: these rows are already covered
            piece = read_piece(found[start])
            pieces.append(piece)
            position = start + len(piece["token_ids"])
        return pieces

    def _fetch_head(self) -> Head:
        vocab_size = self.handshake["vocab_size"]
        with self._run(CaptureRequest(hidden=True, head=True)) as run:
            self._ask(run, 0, _GREETING)
            ranks = self.handshake["head_ranks"]
            parts: dict[int, Path] = {}

            def complete() -> bool:
                for rank in range(ranks):
                    path = run / head_file(rank)
                    if path.is_file() and path not in parts.values():
                        parts[first_row(path)] = path
                return reaches(parts, vocab_size)

            self._wait_for(run, complete, "the head")
            tensors = [read_piece(parts[start]) for start in sorted(parts)]
        head = self.handshake["head"]
        return Head(
            weight=torch.cat([part["weight"] for part in tensors]),
            bias=torch.cat([part["bias"] for part in tensors]) if "bias" in tensors[0] else None,
            scale=float(head["scale"]),
            softcap=None if head["softcap"] is None else float(head["softcap"]),
        )

    def _check_served(
        self,
        index: int,
        answer: Answer,
        token_ids: np.ndarray[Any, Any],
        positions: Sequence[int],
        logits: Tensor,
    ) -> None:
        """Compare the server's log-probs with the captured logits: both must come from the same forward pass."""
        for position, row in zip(positions, logits.float(), strict=True):
            if position + 1 >= len(token_ids) or not row.isfinite().all():
                continue
            value, token = answer.log_probs[position + 1]
            captured = float(row[token].double() - row.double().logsumexp(-1))
            if token != token_ids[position + 1] or value is None or abs(captured - value) > _SERVED_TOLERANCE:
                raise CaptureError(
                    f"{self.label}, window {index}, position {position}: the server gives log p = {value} for token "
                    f"{token}, and the captured logits give {captured:.6f}: they do not belong to this request"
                )

    def _check_handshake(self, model: ModelSpec) -> None:
        told = self.handshake
        if told["protocol"] != PROTOCOL or told["pytest_kld"] != __version__:
            raise ServerError(
                f"the server {self.url} has the hook of pytest-kld {told['pytest_kld']} (protocol "
                f"{told['protocol']}), and this is {__version__} (protocol {PROTOCOL}): install the same version on "
                "both sides."
            )
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

    @contextmanager
    def _run(self, request: CaptureRequest) -> Iterator[Path]:
        run = self.capture_dir / new_run()
        try:
            run.mkdir(parents=True)
            run.chmod(0o777)  # the server may run as another user
            write_json_whole(run / REQUEST_FILE, request.to_json())
        except OSError as error:
            raise ServerError(f"cannot write the capture directory {self.capture_dir}: {error}") from error
        try:
            yield run
        finally:
            shutil.rmtree(run, ignore_errors=True)  # the hook may still be writing there

    def _wait_for(self, run: Path, there: Any, what: str) -> None:
        """Wait for a file after its answer, and check for error reports; the hook writes those before the answer.

        Raises:
            CaptureError: the hook failed, or the file does not appear.

        """
        local = self.server is not None and what == _HANDSHAKE
        timeout = _HANDSHAKE_TIMEOUT_SECONDS if local else _FILE_TIMEOUT_SECONDS
        deadline, seen = time.monotonic() + timeout, 0
        while True:
            complete = there()
            for report in run.glob("error-*.txt"):  # even if all files are there: they may be wrong
                raise CaptureError(f"{self.label}, {what}: the hook failed in the server:\n{report.read_text()}")
            if complete:
                return
            files = sum(1 for _ in run.iterdir())
            if files != seen:
                deadline, seen = time.monotonic() + timeout, files
            if time.monotonic() > deadline or (what == _HANDSHAKE and self._install_errors()):
                raise self._failure(self._missing(what))
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _missing(self, what: str) -> str:
        reports = "".join(f"\n{path.read_text()}" for path in self._install_errors())
        if reports:
            return f"{self.label}: the hook could not be put into {self.kind.title}:{reports}"
        if what == _HANDSHAKE:
            return (
                f"{self.label}: the server answered and the hook did not. It is not in that server, or writes to "
                f"another directory: start the server with {CAPTURE_DIR_VARIABLE} set to the directory that this "
                f"machine sees as {self.capture_dir} (--kld-capture-dir), and pytest-kld installed there. "
                f"{self.kind.hook_advice}"
            )
        return f"{self.label}: the server answered and the hook did not write {what}"

    def _install_errors(self) -> list[Path]:
        return sorted(self.capture_dir.glob("install-error-*.txt"))

    def _failure(self, what: str) -> ServerError:
        if self.pool is None or self.server is None:
            return ServerError(what)
        return self.pool.failure(self.server, what)


def _same_model(model: ModelSpec, served: str) -> bool:
    """Tell whether a server's name for its model matches: the same path or id, or the same one under another mount."""
    mine = model.source.rstrip("/")
    cached = f"models--{model.name.replace('/', '--')}"
    return served == mine or served.rsplit("/", 1)[-1] == mine.rsplit("/", 1)[-1] or cached in served.split("/")
