"""What is kept of a forward pass.

Over the blocks of one pass, request i of the batch owns max(ext[i] - lps[i], 1) consecutive rows, with
ext = extend_seq_lens_cpu, lps = extend_logprob_start_lens_cpu and pre = extend_prefix_lens_cpu. They are rows of
the text if ext > lps, and then start at position pre[i] + lps[i] of the request; else there is one row, computed
only to sample a token. So a window is put together by position, however it was batched, split or chunked.
"""

from __future__ import annotations

import json
import traceback
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pytest_kld.hook.handshake import describe_head, head_part, rank_of, runs_dp_attention, write_handshake
from pytest_kld.hook.protocol import (
    REQUEST_FILE,
    CaptureRequest,
    error_file,
    head_file,
    parse_request_id,
    piece_file,
    write_whole,
)
from pytest_kld.hook.writer import HostCopy, Piece, Writer, copy_to_host

_REMEMBERED_RUNS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """The rows of one request in one pass.

    Attributes:
        run: the run that it belongs to, or None if the request is somebody else's.
        window: the window.
        first_row: its first row over all blocks of the pass.
        rows: how many it owns.
        position: the first row's position in the window.
        token_ids: [rows], on the host's way.

    """

    run: Run | None
    window: int
    first_row: int
    rows: int
    position: int
    token_ids: Tensor | None


@dataclass(slots=True)
class Run:
    """One run as this process sees it."""

    path: Path
    request: CaptureRequest | None = None
    greeted: bool = False

    def read(self) -> CaptureRequest:
        """Return what is wanted, as the other side wrote it down."""
        if self.request is None:
            self.request = CaptureRequest.from_json(json.loads((self.path / REQUEST_FILE).read_text()))
        return self.request


@dataclass(slots=True)
class Pass:
    """The forward pass that is going on, if one of its requests is ours."""

    runner: Any
    rank: int
    segments: list[Segment]
    rows_seen: int = 0
    logits_begun: bool = False
    runs: dict[str, Run] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows that the blocks must add up to."""
        return sum(segment.rows for segment in self.segments)


class Recorder:
    """Watches the forward passes of one SGLang process. Its methods never raise: a broken run is reported instead."""

    def __init__(self, directory: str) -> None:
        """Start the writer's thread when the first rows arrive, not here: SGLang forks."""
        self.current: Pass | None = None
        self._directory = Path(directory)
        self._runs: OrderedDict[str, Run] = OrderedDict()
        self._writer = Writer()

    @contextmanager
    def forward_pass(self, runner: Any, forward_batch: Any) -> Iterator[None]:
        """Bracket a forward pass of any model runner; only the main model's with requests of ours is watched."""
        previous, self.current = self.current, self._begin(runner, forward_batch)
        try:
            yield
        finally:
            self.current = previous

    def begin_logits(self, processor: Any, head: Any) -> None:
        """Note the head, and greet runs that are seen for the first time."""
        current = self.current
        if current is None:
            return
        with self._reporting(current):
            if current.logits_begun:
                raise RuntimeError("the model computes logits twice in one forward pass: which are meant is unknown")
            current.logits_begun = True
            for run in current.runs.values():
                if not run.greeted:
                    self._greet(run, current, processor, head)
                    run.greeted = True

    def take_block(self, hidden: Tensor, logits: Tensor) -> None:
        """Keep what is wanted of a block of rows: hidden states [rows, H] and the logits [rows, V] made of them."""
        current = self.current
        if current is None:
            return
        with self._reporting(current):
            first, count = current.rows_seen, int(hidden.shape[0])
            current.rows_seen += count
            if current.rank != 0:
                return
            for segment in current.segments:
                start = max(segment.first_row, first)
                stop = min(segment.first_row + segment.rows, first + count)
                if segment.run is not None and start < stop:
                    self._keep(segment, start, stop, hidden[start - first : stop - first], logits, start - first)

    def end_logits(self) -> None:
        """Check that the blocks added up to the batch."""
        current = self.current
        if current is None:  # it went wrong in between, and is reported
            return
        with self._reporting(current):
            if current.rows_seen != current.rows:
                raise RuntimeError(f"the batch has {current.rows} rows of logits and {current.rows_seen} were seen")

    def _begin(self, runner: Any, batch: Any) -> Pass | None:
        if runner.is_draft_worker or not getattr(batch, "rids", None) or not batch.forward_mode.is_extend():
            return None
        ours = [parse_request_id(rid) for rid in batch.rids]
        if not any(ours):
            return None
        current = Pass(runner, rank_of(runner), [])
        with self._reporting(current):
            for known in ours:
                if known is not None and (run := self._run(known[0])) is not None:
                    current.runs[known[0]] = run
            if not current.runs:
                return None
            if not batch.return_logprob:
                raise RuntimeError("the request does not ask for log-probs (return_logprob), so most rows are not made")
            current.segments = list(_segments(batch, ours, current.runs))
            for run in current.runs.values():
                run.read()
            return current
        return None

    def _run(self, name: str) -> Run | None:
        """Find a run; one whose directory is elsewhere, or gone, is not ours."""
        if name not in self._runs and (self._directory / name).is_dir():
            self._runs[name] = Run(self._directory / name)
            while len(self._runs) > _REMEMBERED_RUNS:
                self._runs.popitem(last=False)
        return self._runs.get(name)

    def _greet(self, run: Run, current: Pass, processor: Any, head: Any) -> None:
        description = describe_head(processor, head)
        if run.read().head and description["plain"]:
            tensors, where = head_part(head, current.rank)
            if tensors is not None:
                copies = {name: copy_to_host(tensor) for name, tensor in tensors.items()}
                self._writer.put(Piece(run.path / head_file(current.rank), copies, metadata=where))
        if current.rank == 0 or runs_dp_attention(processor):  # then rank 0 may never see this request
            write_handshake(run.path, current.runner, processor, description)

    def _keep(self, segment: Segment, start: int, stop: int, hidden: Tensor, logits: Tensor, offset: int) -> None:
        assert segment.run is not None
        assert segment.token_ids is not None
        request, position = segment.run.read(), segment.position + start - segment.first_row
        ids = segment.token_ids[start - segment.first_row : stop - segment.first_row]
        tensors: dict[str, HostCopy] = {"token_ids": copy_to_host(ids)}
        if request.hidden:
            tensors["hidden"] = copy_to_host(hidden)
            rows = [row for row in request.rows if position <= row < position + stop - start]
            tensors["rows"] = copy_to_host(torch.tensor(rows, dtype=torch.int32))
            index = torch.tensor(rows, dtype=torch.int64, device=logits.device) - position + offset
            tensors["logits"] = copy_to_host(logits[index])
        else:
            tensors["logits"] = copy_to_host(logits[offset : offset + stop - start])
        path = segment.run.path / piece_file(segment.window, position)
        self._writer.put(Piece(path, tensors))

    @contextmanager
    def _reporting(self, current: Pass) -> Iterator[None]:
        """Turn whatever goes wrong into reports in the runs' directories, and stop watching this pass."""
        try:
            yield
        except Exception:
            self.current = None
            for run in current.runs.values():
                _report(run.path / error_file(current.rank), traceback.format_exc())


def _segments(batch: Any, ours: list[tuple[str, int] | None], runs: dict[str, Run]) -> Iterator[Segment]:
    first_row = first_token = 0
    lengths = zip(
        batch.extend_seq_lens_cpu, batch.extend_logprob_start_lens_cpu, batch.extend_prefix_lens_cpu, strict=True
    )
    for known, (extend, start, prefix) in zip(ours, lengths, strict=True):
        extend, start, prefix = int(extend), int(start), int(prefix)
        rows = max(extend - start, 1)
        run = runs.get(known[0]) if known is not None and extend > start else None
        yield Segment(
            run=run,
            window=-1 if known is None else known[1],
            first_row=first_row,
            rows=rows,
            position=prefix + start,
            token_ids=None if run is None else batch.input_ids[first_token + start : first_token + extend],
        )
        first_row += rows
        first_token += extend


def _report(path: Path, text: str) -> None:
    try:
        write_whole(path, text.encode())
    except OSError:  # the run's directory is gone: nobody waits for it any more
        return
