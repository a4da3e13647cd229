"""Experts that a server tells of in its answers are those of the model, or unknown, or an error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytest_kld.engines import Routing
from pytest_kld.engines.served.client import ServedModel
from pytest_kld.engines.served.experts import experts_told
from pytest_kld.engines.sglang.kind import KIND
from pytest_kld.errors import CaptureError

RECORDED: dict[str, Any] = {
    "text": "",
    "output_ids": [430],
    "meta_info": {
        "id": "pytest-kld:x:0",
        "prompt_tokens": 5,
        "input_token_logprobs": [
            *([None, 5, None], [-7.070219993591309, 6, None], [-6.774912357330322, 7, None]),
            *([-7.162787437438965, 8, None], [-7.342502593994141, 9, None]),
        ],
        "routed_experts": (
            "AgAAAAQAAAAGAAAABQAAAAIAAAAHAAAAAAAAAAEAAAAGAAAAAAAAAAIAAAABAAAABAAAAAEAAAAGAAAABQAAAAIAAAAHAAAA"
            "AQAAAAQAAAAEAAAAAQAAAAIAAAAEAAAAAQAAAAYAAAAEAAAAAwAAAAEAAAAAAAAA"
        ),
        "dp_rank": None,
    },
}
"""The answer of SGLang 0.5.23 with `--enable-return-routed-experts` to five tokens, of a tiny Qwen3-MoE."""
ROUTING = Routing(layers=(1, 2), experts=8)
PER_TOKEN = 2
BY_TRANSFORMERS = [[[5, 6], [2, 7]], [[0, 6], [1, 2]], [[5, 6], [2, 7]], [[1, 4], [2, 4]], [[3, 4], [0, 1]]]
"""What transformers routes the same tokens to in the last two layers of the same model."""


def test_a_recorded_answer_is_read_as_transformers_routes() -> None:
    told = KIND.read_answer(RECORDED).experts
    assert told is not None
    assert (told.shape, told.dtype) == ((5, 3 * PER_TOKEN), np.int32)
    found = experts_told(told, ROUTING, PER_TOKEN, "window 0")
    assert found is not None
    assert found.sort(-1).values.tolist() == BY_TRANSFORMERS


def test_a_server_without_the_flag_tells_no_experts() -> None:
    meta = {name: it for name, it in RECORDED["meta_info"].items() if name != "routed_experts"}
    assert KIND.read_answer({**RECORDED, "meta_info": meta}).experts is None


@pytest.mark.parametrize(
    ("columns", "per_token", "largest", "said"),
    [
        (5, 2, 7, r"window 0: the server told 5 experts of each token, which does not fit 2 in each"),
        (6, None, 7, r"does not fit None in each of its layers"),
        (4, 2, 7, r"does not fit 2 in each of its layers \(layer 2 has some\)"),
        (6, 2, 8, r"window 0: the server told experts 7 to 8, and the model has 8"),
    ],
)
def test_ids_that_do_not_fit_the_model_are_an_error(
    columns: int, per_token: int | None, largest: int, said: str
) -> None:
    told = np.resize(np.array([7, largest], np.int32), (3, columns))
    with pytest.raises(CaptureError, match=said):
        experts_told(told, ROUTING, per_token, "window 0")


def served(layers: tuple[int, ...] = ROUTING.layers) -> ServedModel:
    routing = {"layers": layers, "experts": ROUTING.experts, "per_token": PER_TOKEN, "unobserved": None}
    connection: dict[str, Any] = {"kind": KIND, "url": "", "label": "it", "capture_dir": Path()}
    return ServedModel(**connection, api_key=None, pool=None, server=None, handshake={"routing": routing})


def test_layers_that_the_server_did_not_see_make_the_experts_unknown_and_not_number_0() -> None:
    answer = KIND.read_answer(RECORDED)
    assert answer.experts is not None
    zeros = replace(answer, experts=np.where(np.arange(6) < 4, answer.experts, 0).astype(np.int32))
    model = served()
    assert model._experts(0, [{}], zeros) is None
    assert model.routing is not None
    assert model.routing.unobserved is not None


def test_a_window_without_experts_after_one_with_them_is_an_error() -> None:
    answer, model = KIND.read_answer(RECORDED), served()
    assert model._experts(0, [{}], answer) is not None
    with pytest.raises(CaptureError, match="it, window 1: the server did not tell its experts, as of other windows"):
        model._experts(1, [{}], replace(answer, experts=None))
