"""Data-parallel attention is refused by what the running processor does.

No prefill runs under it on a CPU (0.5.23 wants pinned memory), so the processor is made of the two attributes that
tell it; that real releases have them is looked up in their sources.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from sglang_cpu.releases import unpack

from pytest_kld.engines.served.client import ServedModel
from pytest_kld.engines.sglang.kind import KIND
from pytest_kld.errors import ServerError
from pytest_kld.hook import sglang
from pytest_kld.hook.protocol import (
    HANDSHAKE_FILE,
    REQUEST_FILE,
    CaptureRequest,
    new_run,
    request_id,
    write_json_whole,
)
from pytest_kld.hook.recorder import Recorder
from pytest_kld.subjects.model import ModelSpec

ATTRIBUTES = ("do_tensor_parallel_all_gather_dp_attn", "use_attn_tp_group")


def processor(gathers: bool, own_head: bool) -> Any:
    config = SimpleNamespace(vocab_size=7)
    return SimpleNamespace(config=config, **dict(zip(ATTRIBUTES, (gathers, own_head), strict=True)))


def greet(directory: Path, rank: int, processor: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run a greeting through the recorder on a rank; return where its handshake belongs."""
    version: Any = ModuleType("sglang.version")
    version.__version__ = "0.5.23"
    monkeypatch.setitem(sys.modules, "sglang", ModuleType("sglang"))
    monkeypatch.setitem(sys.modules, "sglang.version", version)
    run = directory / new_run()
    run.mkdir()
    write_json_whole(run / REQUEST_FILE, CaptureRequest(hidden=True).to_json())
    arguments = SimpleNamespace(model_path="org/model", served_model_name="org/model", tp_size=2)
    config = SimpleNamespace(hidden_size=4, dtype=torch.bfloat16, quantization=None)
    runner = SimpleNamespace(
        **{"tp_rank": rank, "is_draft_worker": False, "model": torch.nn.Identity(), "device": "cpu"},
        **{"model_config": config, "server_args": arguments},
    )
    batch = SimpleNamespace(
        **{"rids": [request_id(run.name, 0)], "return_logprob": True, "input_ids": torch.tensor([0, 1])},
        **{"extend_seq_lens_cpu": [2], "extend_logprob_start_lens_cpu": [0], "extend_prefix_lens_cpu": [0]},
        forward_mode=SimpleNamespace(is_extend=lambda: True),
    )
    recorder = Recorder(str(directory))
    ids = sglang._request_ids(runner, batch)
    with recorder.forward_pass(ids, lambda: sglang._describe_pass(runner, batch)):
        recorder.begin_logits(lambda: sglang._describe_server(runner, processor, torch.nn.Linear(4, 7)))
    assert not list(run.glob("error-*"))
    return run / HANDSHAKE_FILE


def served(handshake: Path, directory: Path) -> ServedModel:
    told = json.loads(handshake.read_text())
    return ServedModel(
        **{"kind": KIND, "url": "http://node7:30000", "label": "org/model", "handshake": told},
        **{"capture_dir": directory, "api_key": None, "pool": None, "server": None},
    )


@pytest.mark.parametrize(("gathers", "own_head"), [(True, False), (False, True)])
@pytest.mark.parametrize("rank", [0, 1])
def test_whichever_group_gets_the_request_answers_and_is_refused(
    rank: int, gathers: bool, own_head: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handshake = greet(tmp_path, rank, processor(gathers, own_head), monkeypatch)
    with pytest.raises(ServerError, match="cannot be captured: it runs data-parallel attention"):
        served(handshake, tmp_path)._check_handshake(ModelSpec(name="org/model"))


def test_without_it_only_the_first_rank_answers_and_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not greet(tmp_path, 1, processor(False, False), monkeypatch).exists()
    served(greet(tmp_path, 0, processor(False, False), monkeypatch), tmp_path)._check_handshake(
        ModelSpec(name="org/model")
    )


@pytest.mark.parametrize(
    ("arguments", "runs"), [({}, False), ({"attn_dp_size": 1}, False), ({"attn_dp_size": 2}, True)]
)
def test_a_processor_that_says_nothing_leaves_it_to_the_arguments(arguments: dict[str, int], runs: bool) -> None:
    assert sglang.runs_dp_attention(SimpleNamespace(**arguments), SimpleNamespace()) is runs


@pytest.mark.parametrize("release", ["0.5.9", "0.5.15.post1", "0.5.23"])
def test_releases_have_both_attributes(release: str, tmp_path: Path) -> None:
    source = (unpack(release, tmp_path) / "sglang/srt/layers/logits_processor.py").read_text()
    for name in ATTRIBUTES:
        assert f"self.{name} = " in source


def test_a_pipeline_is_refused() -> None:
    refused = sglang._refusal(SimpleNamespace(pp_size=2), SimpleNamespace())
    assert refused is not None
    assert "it is a pipeline" in refused
    assert sglang._refusal(SimpleNamespace(pp_size=1), SimpleNamespace()) is None
