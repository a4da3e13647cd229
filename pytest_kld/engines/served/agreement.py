"""Whether what the hook captured and what the server answered come from the same forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pytest_kld.errors import CaptureError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from pytest_kld.engines.served.kind import Answer

_TOLERANCE = 1e-3
"""Nats by which the server's log-prob may differ from that of the captured logits, due to rounding in float32."""
_TOLD_FOR_THE_LAST = 0
"""What an answer may name in place of the vocabulary's last id, with the log-prob of the last one (SGLang:
`logprob_result_processor.py`, `x if x < vocab_size - 1 else 0`)."""


def check_agreement(
    what: str,
    answer: Answer,
    token_ids: np.ndarray[Any, Any],
    positions: Sequence[int],
    hidden: Tensor | None,
    logits: Tensor,
) -> None:
    """Compare the server's log-probs with the captured logits.

    Args:
        what: the window, for messages.
        answer: the server's.
        token_ids: [N], the window's.
        positions: of the captured logits.
        hidden: [N, H], the captured hidden states, if any.
        logits: [K, V], the captured logits.

    Raises:
        CaptureError: they do not agree.

    """
    if answer.unwritten:
        if all(captured is None or captured.isfinite().all() for captured in (hidden, logits)):
            raise CaptureError(
                f"{what}: the server says that log-probs are not finite, and all that was captured is finite: they do "
                "not belong to the same request"
            )
        return
    for position, row in zip(positions, logits.float(), strict=True):
        if position + 1 >= len(token_ids) or not row.isfinite().all():
            continue
        value, token = answer.log_probs[position + 1]
        if token == _TOLD_FOR_THE_LAST and token_ids[position + 1] == len(row) - 1:
            token = len(row) - 1
        captured = float(row[token].double() - row.double().logsumexp(-1))
        if token != token_ids[position + 1] or value is None or abs(captured - value) > _TOLERANCE:
            raise CaptureError(
                f"{what}, position {position}: the server gives log p = {value} for token {token}, and the captured "
                f"logits give {captured:.6f}: they do not belong to this request"
            )
