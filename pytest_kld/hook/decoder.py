"""Capturing from decode steps, and forcing the text's own tokens.

An engine's seams call `begin` before a forward pass, put `watching_experts` around its layers if they can, call
`see_hidden` at the head, and `take` before a token is sampled. If the layers run before `begin`, `see_experts` tells
what they used.
`take` keeps what the step computed, and returns the tokens that must replace the sampled ones. Every rank samples, so
every rank forces; rank 0 writes.
"""

from __future__ import annotations

import json
import traceback
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pytest_kld.hook.protocol import parse_request_id, piece_file, report_error, tokens_file
from pytest_kld.hook.writer import HostCopy, Piece, Writer

if TYPE_CHECKING:
    from pytest_kld.hook.experts import ExpertWatch
    from pytest_kld.hook.run import Run

_ROWS = 64
"""Positions of a window that are written as one file."""
REMEMBERED_WINDOWS = 10_000
"""As many as `--kld-concurrency` may decode at a time. Beyond that the oldest is dropped: it has ended, or its client
is gone."""
_OF_SOME_POSITIONS = ("logits", "rows")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One forward pass as a sampler sees it. Lists are over the requests of the batch, ours or not.

    Attributes:
        rank: this process's rank among those that compute the same logits.
        positions: the position of the last token that each request ran.
        decoding: whether each request ran this one token only, after others that are in its cache.
        token_ids: [requests], the last token that each ran, on any device.
        logits: [requests, V], the engine's own, before anything is added to them.

    """

    rank: int
    positions: Sequence[int]
    decoding: Sequence[bool]
    token_ids: Tensor
    logits: Tensor


@dataclass(slots=True)
class _Rows:
    """Consecutive positions of a window, on the host; all tensors have room for `_ROWS` rows."""

    start: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    on_gpu: bool = False

    @property
    def count(self) -> int:
        """The number of positions."""
        return self.counts.get("token_ids", 0)

    def add(self, name: str, row: Tensor) -> None:
        """Start copying a row to the host."""
        place = self.counts.get(name, 0)
        self.counts[name] = place + 1
        self.on_gpu |= row.is_cuda
        if name not in self.tensors:
            shape = (_ROWS, *row.shape)
            self.tensors[name] = torch.empty(shape, dtype=row.dtype, device="cpu", pin_memory=row.is_cuda)
        self.tensors[name][place].copy_(row, non_blocking=True)

    def piece(self, path: Path) -> Piece:
        """Return the rows that there are as a file to be written; what only some of the steps showed is left out."""
        ready: torch.cuda.Event | None = torch.cuda.Event() if self.on_gpu else None  # type: ignore[no-untyped-call]
        if ready is not None:
            ready.record()
        return Piece(
            path,
            {
                name: HostCopy(tensor=tensor[: self.counts[name]], ready=ready)
                for name, tensor in self.tensors.items()
                if self.counts[name] == self.count or name in _OF_SOME_POSITIONS
            },
        )


@dataclass(slots=True)
class _Window:
    """A window that is being decoded."""

    tokens: array[int]
    rows: _Rows | None = None


class Decoder:
    """Forces tokens in one process and writes what its decode steps computed. Its methods never raise.

    Attributes:
        watching: whether one of the pass's requests is ours; see `begin`.

    """

    def __init__(self, find_run: Callable[[str], Run | None], writer: Writer) -> None:
        """Take over how runs are found and files are written."""
        self._find_run, self._writer = find_run, writer
        self._windows: OrderedDict[tuple[str, int], _Window] = OrderedDict()
        self.watching = False
        self._requests = 0
        self._hidden: Tensor | None = None
        self._experts: Tensor | None = None
        self._failure = ""

    def begin(self, request_ids: Sequence[object]) -> None:
        """Forget the last pass. If one of these requests is ours, the next head's input is that of a decode step."""
        self._hidden, self._experts, self._failure = None, None, ""
        self._requests = len(request_ids)
        self.watching = any(parse_request_id(rid) is not None for rid in request_ids)

    def see_hidden(self, hidden: Tensor) -> None:
        """Keep the head's input [requests, H] until `take`. A graph that is replayed does not call this."""
        if self.watching:
            self._hidden = hidden

    @contextmanager
    def watching_experts(self, find: Callable[[], ExpertWatch | None]) -> Iterator[None]:
        """Keep the experts of a decode step until `take`. After `begin`, around what runs the layers.

        Args:
            find: returns the watch of the model that runs; None for a dense model. Called if the step is ours.

        """
        watch: ExpertWatch | None = None
        if self.watching:
            try:
                watch = find()
                if watch is not None:
                    watch.attach()
            except Exception:
                self._failure = traceback.format_exc()
        try:
            yield
        finally:
            if watch is not None:
                try:
                    self._experts = watch.routes(slice(0, self._requests), self._requests)
                except Exception:  # the server must keep running; `take` reports it
                    self._failure = traceback.format_exc()
                watch.detach()

    def see_experts(self, find: Callable[[], Tensor | None]) -> None:
        """Keep the experts of a decode step until `take`, if its layers ran before `begin`.

        Args:
            find: returns the experts [requests, layers, K] of the tokens that ran; None if they are unknown. Called if
                the step is ours.

        """
        if self.watching:
            try:
                self._experts = find()
            except Exception:  # the server must keep running; `take` reports it
                self._failure = traceback.format_exc()

    def take(self, request_ids: Sequence[object], describe: Callable[[], Step]) -> list[tuple[int, int]]:
        """Keep the rows of our requests and return what must be sampled: request and token.

        Args:
            request_ids: the batch's request ids.
            describe: called if one of them is ours.

        """
        ours: list[tuple[int, Run, int]] = []
        for index, rid in enumerate(request_ids):
            known = parse_request_id(rid)
            run = None if known is None else self._find_run(known[0])
            if known is not None and run is not None:
                ours.append((index, run, known[1]))
        if not ours:
            return []
        forced: list[tuple[int, int]] = []
        step: Step | None = None
        try:
            decoded = [(index, run, window) for index, run, window in ours if run.read().prompt_size is not None]
            if decoded:
                if self._failure:
                    raise RuntimeError(self._failure)
                step = describe()
            for index, run, window in decoded:
                assert step is not None
                token = self._take(step, index, run, window)
                if token is not None:
                    forced.append((index, token))
        except Exception:
            for run in {id(run): run for _, run, _ in ours}.values():
                report_error(run.path, 0 if step is None else step.rank, traceback.format_exc())
        return forced

    def _take(self, step: Step, index: int, run: Run, window: int) -> int | None:
        """Keep one request's row, if a decode step computed it, and return the token that the text has next."""
        prompt, position = run.read().prompt_size, step.positions[index]
        assert prompt is not None
        if position < prompt - 1:  # a chunk of the prompt
            return None
        known = self._window(run, window)
        if position >= prompt:
            if not step.decoding[index]:
                raise RuntimeError(
                    f"window {window}: at position {position} the server prefilled what it had decoded, because it had "
                    "no room for all sequences. Give a smaller --kld-concurrency, or the server more memory"
                )
            if step.rank == 0 and position < len(known.tokens):
                self._keep(step, index, run, window, known, position)
        return known.tokens[position + 1] if position + 1 < len(known.tokens) else None

    def _keep(self, step: Step, index: int, run: Run, window: int, known: _Window, position: int) -> None:
        request = run.read()
        if known.rows is None or position != known.rows.start + known.rows.count:
            self._flush(run, window, known)
            known.rows = _Rows(position)
        rows = known.rows
        rows.add("token_ids", step.token_ids[index])
        together = len(step.positions) if all(step.decoding) else 0
        rows.add("together", torch.tensor(together, dtype=torch.int32))
        if request.hidden and self._hidden is not None and len(self._hidden) >= len(step.positions):
            rows.add("hidden", self._hidden[index])
        if self._experts is not None and len(self._experts) == len(step.positions):
            rows.add("experts", self._experts[index])
        if not request.hidden or position in request.rows:
            rows.add("logits", step.logits[index])
            rows.add("rows", torch.tensor(position, dtype=torch.int32))
        if rows.count == _ROWS or position == len(known.tokens) - 1:
            self._flush(run, window, known)

    def _flush(self, run: Run, window: int, known: _Window) -> None:
        if known.rows is not None:
            self._writer.put(known.rows.piece(run.path / piece_file(window, known.rows.start)))
        known.rows = None

    def _window(self, run: Run, window: int) -> _Window:
        key = (run.path.name, window)
        if key not in self._windows:
            self._windows[key] = _Window(array("i", json.loads((run.path / tokens_file(window)).read_text())))
            while len(self._windows) > REMEMBERED_WINDOWS:
                self._windows.popitem(last=False)
        return self._windows[key]
