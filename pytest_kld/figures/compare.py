"""Compares two captures: passes both sides' logits block by block through the kernel into Scores."""

from __future__ import annotations

from dataclasses import fields, replace
from traceback import clear_frames
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pytest_kld import __version__
from pytest_kld.captures.capture import LogitsReader
from pytest_kld.errors import CaptureError
from pytest_kld.figures.evidence import gather_evidence
from pytest_kld.figures.experts import routes_evidence
from pytest_kld.figures.scores import COLUMNS, EXTENDED_COLUMNS, SCHEMA, Scores
from pytest_kld.kernel.device import release_memory
from pytest_kld.kernel.divergence import Divergence, divergence
from pytest_kld.kernel.extended import Extended, extended_divergence
from pytest_kld.kernel.reduction import Reduction, compiled_reduction, eager_reduction

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pytest_kld.captures.capture import Capture
    from pytest_kld.kernel.head import HeadMode
    from pytest_kld.progress import Progress
    from pytest_kld.text.windows import Windows

_BLOCK_ELEMENTS = 1 << 25
"""Logits per side and block: 128 MiB in float32, regardless of the number of windows."""
_WORTH_COMPILING = 5_000_000_000
"""Logits per side above which compiling pays off on a CPU: it saves 5 ns for each and takes 20 s."""


def compare(
    reference: Capture,
    candidate: Capture,
    windows: Windows,
    *,
    head: HeadMode,
    device: torch.device,
    progress: Progress,
    extended: bool = False,
    known: Scores | None = None,
) -> Scores:
    """Compute the figures of every position of every window. Device memory is released, even after an error.

    Args:
        reference: the reference's capture.
        candidate: the candidate's capture of the same windows.
        windows: the windows of both captures.
        head: how logits are recomputed from hidden states.
        device: where to compute.
        progress: notified after each window.
        extended: whether to make a second pass for the columns of `Extended`.
        known: scores of the first windows of the same pair; they are reused if they come from the same kernel.

    Raises:
        CaptureError: the captures differ in token ids, a window is short, or an id lies outside the common
            vocabulary.

    """
    vocab_size = min(reference.vocab_size, candidate.vocab_size)
    _require_labels(vocab_size, windows, reference, candidate)
    readers: list[LogitsReader] = []
    try:
        readers += (LogitsReader.of(capture, head, device) for capture in (reference, candidate))
        reduction, kernel = _pick_reduction(windows, reference, candidate, device)
        columns, done = _columns(windows, extended, known if known and known.about["kernel"] == kernel else None)
        with progress.task(f"compare {candidate.name}", windows.count, done) as task:
            for window in range(done, windows.count):
                _require_same_ids(window, windows, reference, candidate)
                _score_window(window, windows, readers, reduction, columns)
                task.advance()
        about = _about(reference, candidate, windows, head, device, kernel, vocab_size)
        routes = routes_evidence(reference, candidate, windows)
        scores = Scores(columns=columns, about=about, evidence={"starts": windows.starts, **routes})
        return replace(scores, evidence=gather_evidence(scores, readers))
    except BaseException as error:
        clear_frames(error.__traceback__)  # a stored error would otherwise keep the heads and blocks of logits alive
        raise
    finally:
        readers.clear()
        release_memory(device)


def _columns(windows: Windows, extended: bool, known: Scores | None) -> tuple[dict[str, NDArray[Any]], int]:
    """Return the table's columns, and the number of windows already filled in from known scores."""
    shape, done = (windows.count, windows.rows), 0
    columns = {name: np.empty(shape, dtype) for name, dtype in COLUMNS.items()}
    if extended:
        columns |= {name: np.empty(shape, np.float64) for name in EXTENDED_COLUMNS}
    columns["token_ids"][:] = windows.token_ids[:, windows.first_position :]
    if known is not None and known.columns.keys() >= columns.keys():
        done = len(known.columns["flags"])
        for name, column in columns.items():
            column[:done] = known.columns[name]
    return columns, done


def _score_window(
    window: int,
    windows: Windows,
    readers: list[LogitsReader],
    reduction: Reduction,
    columns: dict[str, NDArray[Any]],
) -> None:
    labels = torch.from_numpy(np.append(windows.token_ids[window, 1:], -1))
    rows = max(1, _BLOCK_ELEMENTS // max(reader.capture.vocab_size for reader in readers))
    first = windows.first_position
    for start in range(first, windows.size, rows):
        stop = min(start + rows, windows.size)
        logits_r, logits_c = (reader.logits(window, start, stop) for reader in readers)
        block_labels = labels[start:stop].to(logits_r.device)
        _keep(divergence(logits_r, logits_c, block_labels, reduction=reduction), columns, window, start - first)
        if EXTENDED_COLUMNS[0] in columns:
            _keep(extended_divergence(logits_r, logits_c), columns, window, start - first)


def _keep(figures: Divergence | Extended, columns: dict[str, NDArray[Any]], window: int, start: int) -> None:
    for field in fields(figures):
        values = getattr(figures, field.name).numpy()
        columns[field.name][window, start : start + len(values)] = values


def scores_key(reference: Capture, candidate: Capture, windows: Windows, head: HeadMode) -> dict[str, Any]:
    """Return what determines the scores of a pair, as JSON for the cache key."""
    return {
        "schema": SCHEMA,
        "pytest_kld": __version__,
        "reference": reference.digest,
        "candidate": candidate.digest,
        # Captures of two backends may be bitwise equal, but their descriptions in the scores differ.
        "captures": [reference.manifest["key"], candidate.manifest["key"]],
        "token_ids_sha256": windows.digest,
        "head": head,
        **({} if windows.decoding is None else {"decoding": windows.decoding.to_json()}),
    }


def _pick_reduction(
    windows: Windows, reference: Capture, candidate: Capture, device: torch.device
) -> tuple[Reduction, str]:
    widths = reference.vocab_size, candidate.vocab_size
    if device.type != "cpu" or windows.count * windows.rows * min(widths) < _WORTH_COMPILING:
        return eager_reduction, "eager"
    try:
        reduction = compiled_reduction()
        generator, labels = torch.Generator().manual_seed(0), torch.tensor([0, 0])
        z_r, z_c = (torch.randn(2, width, generator=generator) * 4 for width in widths)
        compiled, eager = (divergence(z_r, z_c, labels, reduction=way) for way in (reduction, eager_reduction))
        for figure in fields(Divergence):  # a compiler may be installed but broken
            torch.testing.assert_close(getattr(compiled, figure.name), getattr(eager, figure.name), rtol=1e-4, atol=0)
    except Exception as error:
        return eager_reduction, f"eager (torch.compile does not work here: {type(error).__name__})"
    return reduction, "compiled"


def _require_labels(vocab_size: int, windows: Windows, reference: Capture, candidate: Capture) -> None:
    greatest = int(windows.token_ids.max())
    if greatest >= vocab_size:
        raise CaptureError(
            f"the windows use token id {greatest:,}, but the vocabulary common to {reference.name} "
            f"({reference.vocab_size:,}) and {candidate.name} ({candidate.vocab_size:,}) ends before it"
        )


def _require_same_ids(window: int, windows: Windows, *captures: Capture) -> None:
    for capture in captures:
        if capture.first_position > windows.first_position:
            raise CaptureError(
                f"the capture {capture.path} begins at position {capture.first_position:,} of each window, and the "
                f"comparison at {windows.first_position:,}: one was decoded and the other was not"
            )
        ids = capture.token_ids(window)
        if ids is not None and not np.array_equal(ids.numpy(), windows.token_ids[window]):
            raise CaptureError(f"token ids differ: window {window} of {capture.path} has other ids than this session's")


def _about(
    reference: Capture,
    candidate: Capture,
    windows: Windows,
    head: HeadMode,
    device: torch.device,
    kernel: str,
    vocab_size: int,
) -> dict[str, Any]:
    sides = {"reference": reference, "candidate": candidate}
    return {
        **{side: describe_capture(capture) for side, capture in sides.items()},
        "protocol": windows.protocol(),
        "skip_first": 0,
        "head": head,
        "vocab_size": vocab_size,
        "kernel": kernel,
        "device": str(device),
        "versions": {"pytest-kld": __version__, "torch": str(torch.__version__)},
        "scores": None,
    }


def describe_capture(capture: Capture) -> dict[str, Any]:
    """Return what scores say of a capture, as JSON."""
    described = ("model", "facts", "runtime", "routing", "key", "store", "store_reason", "vocab_size", "transforms")
    described_side = {name: capture.manifest.get(name) for name in (*described, "checks")}
    return {"digest": capture.digest, **described_side, "vocab_size": capture.vocab_size}
