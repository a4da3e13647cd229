"""Whether a server's answer and what its hook captured belong together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pytest_kld.engines.served.agreement import check_agreement
from pytest_kld.engines.served.kind import Answer
from pytest_kld.errors import CaptureError

LOGITS = torch.linspace(-3, 5, 16).reshape(1, 16)
LOG_P = LOGITS.double().log_softmax(-1)[0]


def check(actual: int, told: int, value: float | None) -> None:
    """Check the answer for the second of two tokens."""
    answer = Answer(request_id="", prompt_tokens=2, log_probs=[(None, 3), (value, told)])
    check_agreement("window 0", answer, np.array([3, actual]), [0], None, LOGITS)


def test_an_answer_with_the_log_prob_of_the_captured_logits_is_right() -> None:
    check(7, 7, float(LOG_P[7]))


@pytest.mark.parametrize(
    ("actual", "told", "value"),
    [
        (7, 7, float(LOG_P[7]) + 0.01),
        (7, 7, None),
        (7, 8, float(LOG_P[7])),
        (14, 0, float(LOG_P[14])),
        (15, 0, float(LOG_P[0])),
        (15, 1, float(LOG_P[15])),
    ],
)
def test_another_token_or_another_log_prob_is_an_error(actual: int, told: int, value: float | None) -> None:
    with pytest.raises(CaptureError, match="they do not belong to this request"):
        check(actual, told, value)


def test_the_last_id_may_be_told_as_0_with_the_log_prob_of_the_last() -> None:
    """SGLang does so."""
    check(15, 0, float(LOG_P[15]))
