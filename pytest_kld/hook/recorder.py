"""Capturing from a forward pass.

An engine's seams describe a pass in plain values: which rows belong to which request, and which positions they are. So
a window is assembled by position, however it was batched, split or chunked.
"""

from __future__ import annotations

import os
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pytest_kld.hook.decoder import Decoder
from pytest_kld.hook.experts import ExpertWatch
from pytest_kld.hook.handshake import ServerDescription, write_handshake
from pytest_kld.hook.protocol import (
    head_file,
    parse_request_id,
    piece_file,
    report_error,
)
from pytest_kld.hook.run import Run
from pytest_kld.hook.writer import Piece, Writer, copy_to_host

_REMEMBERED_RUNS = 64


Describe = Callable[[], ServerDescription]
LogitsOf = Callable[[Tensor | slice], Tensor]
"""Takes rows of a block, as indices or a slice, and returns their logits [rows, V]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """The rows of one request in one pass.

    Attributes:
        request_id: the request's id.
        first_row: its first row over all blocks of the pass.
        rows: how many rows it owns.
        position: the first row's position in the request.
        token_ids: [rows] that the model ran, on any device; None if the rows are not positions of the text but were
            computed only to sample a token.
        first_token: the place of the first row's token among all tokens of the pass; None if it is unknown.

    """

    request_id: str
    first_row: int
    rows: int
    position: int
    token_ids: Tensor | None
    first_token: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PassDescription:
    """A forward pass, as the seams read it from the engine's batch.

    Attributes:
        rank: this process's rank among those that compute the same rows; rank 0 writes them.
        segments: the rows of every request, ours or not, in order.
        tokens: the number of tokens that the pass ran; None if it is unknown.

    """

    rank: int
    segments: Sequence[Segment]
    tokens: int | None = None


@dataclass(slots=True)
class Pass:
    """The current forward pass, if one of its requests is ours."""

    runs: dict[str, Run]
    rank: int = 0
    segments: Sequence[Segment] = ()
    tokens: int | None = None
    experts: ExpertWatch | None = None
    rows_seen: int = 0
    logits_begun: bool = False

    @property
    def rows(self) -> int:
        """Rows that the blocks must add up to."""
        return sum(segment.rows for segment in self.segments)


class Recorder:
    """Watches the forward passes of one process. Its methods never raise: they report a failed run instead.

    The calls for a pass, in order: `forward_pass` around it, `begin_logits`, `take_block` for each block of rows,
    `end_logits`.
    """

    def __init__(self, directory: str) -> None:
        """Start no thread here, because engines fork: the writer's thread starts when the first rows arrive."""
        self.current: Pass | None = None
        self.directory = Path(directory)
        self._runs: OrderedDict[str, Run] = OrderedDict()
        self._writer = Writer()
        self.decoder = Decoder(self._run, self._writer)

    @contextmanager
    def forward_pass(self, request_ids: Sequence[object], describe: Callable[[], PassDescription]) -> Iterator[None]:
        """Bracket a forward pass; only a pass with our requests is watched.

        Args:
            request_ids: the batch's request ids; empty for a pass that must not be watched, such as a draft model's.
            describe: called if one of them is ours. An exception from it is reported to our runs.

        """
        previous, self.current = self.current, self._begin(request_ids, describe)
        try:
            yield
        finally:
            self.current = previous

    @contextmanager
    def watching_experts(self, find: Callable[[], ExpertWatch | None]) -> Iterator[None]:
        """Watch which experts a pass uses. Within `forward_pass`, around what runs the layers.

        Args:
            find: returns the watch of the model that runs; None for a dense model. Called if the pass is ours.

        """
        current = self.current
        if current is not None:
            with self._reporting(current):
                current.experts = find()
                if current.experts is not None:
                    current.experts.attach()
        try:
            yield
        finally:
            if current is not None and current.experts is not None:
                current.experts.detach()

    def use_experts(self, find: Callable[[], ExpertWatch | None]) -> None:
        """Take the experts of a pass whose layers ran before `forward_pass` began.

        Args:
            find: returns the watch that saw them; None if nothing did. Called if the pass is ours.

        """
        current = self.current
        if current is not None:
            with self._reporting(current):
                current.experts = find()

    def begin_logits(self, describe: Describe) -> None:
        """Write the handshake, and the head if requested, for runs that are seen for the first time.

        Args:
            describe: called if there are any.

        """
        current = self.current
        if current is None:
            return
        with self._reporting(current):
            if current.logits_begun:
                raise RuntimeError("the model computes logits twice in one forward pass: which to capture is unknown")
            current.logits_begun = True
            for run in current.runs.values():
                if not run.greeted:
                    self._greet(run, current.rank, describe())
                    run.greeted = True

    def take_block(self, hidden: Tensor, logits_of: LogitsOf) -> None:
        """Capture the requested part of a block of rows.

        Args:
            hidden: [rows, H], the head's input.
            logits_of: returns the engine's own logits for some of these rows. Every rank makes the same calls, so that
                the ranks may compute them together.

        """
        current = self.current
        if current is None:
            return
        with self._reporting(current):
            first, count = current.rows_seen, int(hidden.shape[0])
            current.rows_seen += count
            for segment in current.segments:
                start = max(segment.first_row, first)
                stop = min(segment.first_row + segment.rows, first + count)
                if segment.token_ids is not None and start < stop:
                    self._take(current, segment, start, slice(start - first, stop - first), hidden, logits_of)

    def end_logits(self) -> None:
        """Check that the blocks added up to the batch."""
        current = self.current
        if current is None:  # something failed in between, and was reported
            return
        with self._reporting(current):
            if current.rows_seen != current.rows:
                raise RuntimeError(f"the batch has {current.rows} rows of logits and {current.rows_seen} were seen")

    def _begin(self, request_ids: Sequence[object], describe: Callable[[], PassDescription]) -> Pass | None:
        names = [known[0] for known in map(parse_request_id, request_ids) if known is not None]
        current = Pass({name: run for name in names if (run := self._run(name)) is not None})
        if not current.runs:
            return None
        with self._reporting(current):
            current.runs = {name: run for name, run in current.runs.items() if run.read().prompt_size is None}
            if not current.runs:  # they decode: see `Decoder`
                return None
            described = describe()
            current.rank, current.segments, current.tokens = described.rank, described.segments, described.tokens
            for run in current.runs.values():
                run.read()
            return current
        return None

    def _run(self, name: str) -> Run | None:
        """Find a run; a run whose directory is elsewhere or gone is not ours."""
        if name not in self._runs and _is_there(self.directory / name):
            self._runs[name] = Run(self.directory / name)
            while len(self._runs) > _REMEMBERED_RUNS:
                self._runs.popitem(last=False)
        return self._runs.get(name)

    def _greet(self, run: Run, rank: int, description: ServerDescription) -> None:
        if run.read().head and description.head.plain and (part := description.head_part()) is not None:
            copies = {name: copy_to_host(tensor) for name, tensor in part.tensors.items()}
            where = {"start": str(part.start), "stop": str(part.stop)}
            self._writer.put(Piece(run.path / head_file(rank), copies, metadata=where))
        if rank == 0 or description.refusal is not None:  # after a refusal rank 0 may never see this request
            write_handshake(run.path, description)

    def _take(
        self, current: Pass, segment: Segment, start: int, block: slice, hidden: Tensor, logits_of: LogitsOf
    ) -> None:
        """Capture the requested part of a segment's rows from `start` on, which are rows `block` of the block."""
        known = parse_request_id(segment.request_id)
        run = None if known is None else current.runs.get(known[0])
        if known is None or run is None or segment.token_ids is None:
            return
        request, offset, count = run.read(), start - segment.first_row, block.stop - block.start
        position, reached = segment.position + offset, run.reached.get(known[1], 0)
        if position > reached:
            raise RuntimeError(
                f"window {known[1]}: after {reached} positions the engine ran position {position}: it took those in "
                "between from a prefix cache, or from another server, and their rows are lost"
            )
        run.reached[known[1]] = max(reached, position + count)
        rows = [row for row in request.rows if position <= row < position + count]
        if request.hidden:
            logits = logits_of(torch.tensor(rows, dtype=torch.int64, device=hidden.device) - position + block.start)
        else:
            logits = logits_of(block)
        if current.rank != 0:
            return
        tensors = {
            "token_ids": copy_to_host(segment.token_ids[offset : offset + count]),
            "logits": copy_to_host(logits),
        }
        if request.hidden:
            tensors["hidden"] = copy_to_host(hidden[block])
            tensors["rows"] = copy_to_host(torch.tensor(rows, dtype=torch.int32))
        if (routes := _routes(current, segment, offset, count)) is not None:
            tensors["experts"] = copy_to_host(routes)
        self._writer.put(Piece(run.path / piece_file(known[1], position), tensors))

    @contextmanager
    def _reporting(self, current: Pass) -> Iterator[None]:
        """Turn any exception into reports in the runs' directories, and stop watching this pass."""
        try:
            yield
        except Exception:
            self.current = None
            for run in current.runs.values():
                report_error(run.path, current.rank, traceback.format_exc())


def _is_there(run: Path) -> bool:
    """Tell whether a run's directory is there. One that this user may not enter is another user's."""
    try:
        return run.is_dir() and os.access(run, os.W_OK | os.X_OK)
    except OSError:
        return False


def _routes(current: Pass, segment: Segment, offset: int, count: int) -> Tensor | None:
    """Return the experts [count, layers, K] of a segment's rows from `offset` on, if the pass tells them."""
    if current.experts is None or current.tokens is None or segment.first_token is None:
        return None
    first = segment.first_token + offset
    return current.experts.routes(slice(first, first + count), current.tokens)
