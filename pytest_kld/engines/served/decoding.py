"""Decoding on a server: sends batches of prompts, and assembles what the hook wrote at each step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pytest_kld.engines import Prefill
from pytest_kld.engines.served.pieces import join, narrow
from pytest_kld.errors import CaptureError, ServerError
from pytest_kld.hook.protocol import CaptureRequest, request_id, tokens_file, write_json_whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from pytest_kld.engines.served.connection import Connection
    from pytest_kld.text.windows import Windows


def decode(
    served: Connection, windows: Windows, indices: Sequence[int], rows: Sequence[int] | None
) -> Iterator[Prefill]:
    """Decode windows on a server, a batch at a time. See `LoadedModel.decode`.

    A batch is one request, so that the server has all of its prompts before it decodes the first of them.

    Raises:
        ServerError: the server decodes in another way than one token a step.
        CaptureError: the server ran other tokens, or other sequences beside these, or not all of these together.

    """
    decoding = windows.decoding
    assert decoding is not None
    told = served.handshake["arguments"]
    if (why_not := served.kind.why_not_decoding(told, decoding.concurrency)) is not None:
        raise ServerError(f"{served.label}: {why_not}.")
    request = CaptureRequest(hidden=rows is not None, rows=tuple(rows or ()), prompt_size=decoding.prompt_size)
    with served.run(request) as run:
        for number, batch in enumerate(decoding.batches(indices)):
            first = number * decoding.concurrency
            _run_batch(served, run, windows, first, batch)
            for place, index in enumerate(dict.fromkeys(batch)):
                yield _assembled(served, run, request, windows, first + place, index)
            for path in run.glob("[0-9]*.safetensors"):
                path.unlink()


def _run_batch(served: Connection, run: Path, windows: Windows, first: int, batch: Sequence[int]) -> None:
    """Let the server decode windows together; they have consecutive numbers, the first of which is `first`."""
    prompt = windows.first_position
    for number, index in enumerate(batch, first):
        write_json_whole(run / tokens_file(number), windows.token_ids[index].tolist())
    prompts = [windows.token_ids[index, :prompt].tolist() for index in batch]
    ids = [request_id(run.name, number) for number in range(first, first + len(batch))]
    # The token after the window's end is sampled after its last step, and not run.
    path, body = served.kind.decode_request(ids, prompts, windows.rows + 1)
    what = f"{served.label}, windows {batch[0]} to {max(batch)}"
    answers = served.post(path, body, served.kind.read_decoded, what)
    served.require_no_report(run, what)
    if [answer.request_id for answer in answers] != ids:
        raise served.failure(f"{what}: the server answered other requests than it was sent")
    for index, answer in zip(batch, answers, strict=True):
        wanted = windows.token_ids[index, prompt:].tolist()
        if list(answer.token_ids[:-1]) != wanted or len(answer.token_ids) != len(wanted) + 1:
            raise CaptureError(
                f"{served.label}, window {index}: the server decoded {len(answer.token_ids):,} tokens, and not those "
                "of the text: its scheduler did not go on with the tokens that the hook gave it"
            )


def _assembled(
    served: Connection, run: Path, request: CaptureRequest, windows: Windows, number: int, index: int
) -> Prefill:
    first, count = windows.first_position, windows.rows
    pieces = served.pieces(run, number, count, first)
    what = f"{served.label}, window {index}"
    ids = join(pieces, "token_ids").to(torch.int32)
    if not torch.equal(ids, torch.from_numpy(windows.token_ids[index, first:])):
        raise CaptureError(f"{what}: the server decoded other token ids than those of the text")
    assert windows.decoding is not None
    _require_together(join(pieces, "together"), windows.decoding.concurrency, what)
    with_logits = [piece for piece in pieces if "logits" in piece]
    rows = [] if not with_logits else join(with_logits, "rows").tolist()
    if rows != list(request.rows if request.hidden else range(first, windows.size)):
        raise CaptureError(f"{what}: the hook wrote other rows than were asked for")
    logits = narrow(join(with_logits, "logits"), getattr(torch, served.handshake["dtype"]))
    seen = request.hidden and all("hidden" in piece for piece in pieces)
    experts = join(pieces, "experts") if all("experts" in piece for piece in pieces) else None
    return Prefill(window=index, hidden=join(pieces, "hidden") if seen else None, logits=logits, experts=experts)


def _require_together(together: Tensor, concurrency: int, what: str) -> None:
    others = together[together != concurrency]
    if mixed := int((others == 0).sum()):
        raise CaptureError(
            f"{what}: {mixed:,} of {len(together):,} steps also prefilled a sequence, so other kernels may have run. "
            "Does nobody else use the server?"
        )
    if len(others):
        raise CaptureError(
            f"{what}: {len(others):,} of {len(together):,} steps decoded {int(others.min()):,} to "
            f"{int(others.max()):,} sequences together instead of {concurrency:,}. Does the server admit as many "
            "(see its --max-running-requests or --max-num-seqs, and its memory), and does nobody else use it?"
        )
