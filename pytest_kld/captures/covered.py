"""The windows that a capture covers, from the capture alone: nothing is tokenized."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pytest_kld.errors import CaptureError
from pytest_kld.text.windows import Decoding, Windows, join_windows

if TYPE_CHECKING:
    from pytest_kld.captures.capture import Capture

_MOST = 2**62


def windows_of(capture: Capture) -> Windows:
    """Return the windows that a capture covers.

    Raises:
        CaptureError: the capture has no token ids, as in the original layout, or other ids than its manifest says.

    """
    protocol = capture.manifest["protocol"]
    found = [] if protocol is None else [capture.token_ids(window) for window in range(capture.windows)]
    ids = [each.numpy() for each in found if each is not None]
    if protocol is None or len(ids) < capture.windows:
        raise CaptureError(
            f"the capture {capture.path} has no token ids, as in the original layout: give them to it with "
            "`pytest-kld import-logprobs`, or compare it with a capture that has them"
        )
    decoding = capture.decoding
    starts = _starts(capture)
    token_ids, parts, start = np.stack(ids).astype(np.int32), [], 0
    for part in protocol["datasets"]:
        count = part["windows"]
        parts.append(
            Windows(
                token_ids=token_ids[start : start + count],
                starts=starts[start : start + count],
                stride=protocol["stride"],
                dataset=part["dataset"],
                text_sha256=part["text_sha256"],
                tokenizer=protocol["tokenizer"],
                bos=protocol["bos"],
                decoding=None if decoding is None else Decoding(**decoding),
                taken_from=protocol.get("windows_from"),
                text_tokens=part.get("text_tokens"),
            )
        )
        start += count
    windows = join_windows(parts)
    if windows.digest != protocol["token_ids_sha256"]:
        raise CaptureError(f"the capture {capture.path} has other token ids than its manifest says; record it again")
    return windows


def _starts(capture: Capture) -> NDArray[np.int64]:
    """Return where each window begins in its text, in tokens: [windows]."""
    starts = capture.manifest.get("starts")
    if not (
        isinstance(starts, list)
        and len(starts) == capture.windows
        and all(type(start) is int and 0 <= start < _MOST for start in starts)
    ):
        raise CaptureError(f"the manifest of {capture.path} does not say where its windows begin; record it again")
    return np.array(starts, np.int64)
