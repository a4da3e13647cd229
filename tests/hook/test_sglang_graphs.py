"""No prefill graph of SGLang bypasses the hook: the code that decides it, taken out of every supported release and run.

The hook sits in the LogitsProcessor, which a graph must not swallow. Up to 0.5.15 a pass with log-probs runs without a
graph. Later the graph takes the place of the layers alone, and the LogitsProcessor runs in Python after it.
"""

from __future__ import annotations

import ast
import contextlib
import copy
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from sglang_cpu.releases import unpack

pytestmark = pytest.mark.slow

EAGER = {
    "0.5.9": ("piecewise_cuda_graph_runner.py", "can_run"),
    "0.5.10.post1": ("piecewise_cuda_graph_runner.py", "can_run"),
    "0.5.15.post1": ("runner/prefill_cuda_graph_runner.py", "can_run_graph"),
}
"""Where each release decides that a pass runs without a graph."""
TAIL = ("0.5.18", "0.5.23")
"""Releases whose graphs hold the layers alone."""


class Backend(Enum):
    BREAKABLE, FULL, TC_PIECEWISE = range(3)


def runner(release: str, file: str, directory: Path, *methods: str) -> type[Any]:
    """Return a class with these methods of a release's runner and nothing else of it."""
    source = unpack(release, directory) / "sglang" / "srt" / "model_executor" / file
    (found,) = [
        node
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name.endswith("CudaGraphRunner")
    ]
    kept: list[ast.stmt] = [node for node in found.body if isinstance(node, ast.FunctionDef) and node.name in methods]
    assert len(kept) == len(methods)
    future = ast.parse("from __future__ import annotations").body
    module = ast.Module([*future, ast.ClassDef("Runner", [], [], kept, [])], [])
    space: dict[str, Any] = {
        "Backend": Backend,
        "copy": copy,
        "is_cuda": lambda: True,
        "_slice_output_rows": lambda rows, count: rows[:count],
        "_MAX_PREFILL_CUDA_GRAPH_PADDING_FACTOR": 2,
        "maybe_publish_prefill_shared_read_done": lambda *_: None,
    }
    exec(compile(ast.fix_missing_locations(module), str(source), "exec"), space)
    made: type[Any] = space["Runner"]
    return made


def batch(*, return_logprob: bool) -> SimpleNamespace:
    """Four tokens of one sequence; with log-probs, from the first token on, as the gate asks for them."""
    return SimpleNamespace(
        batch_size=1,
        input_ids=[1, 2, 3, 4],
        positions=[0, 1, 2, 3],
        return_logprob=return_logprob,
        extend_logprob_start_lens_cpu=[0] if return_logprob else [4],
        extend_seq_lens_cpu=[4],
        input_embeds=None,
        replace_embeds=None,
        mm_input_embeds=None,
        global_num_tokens_cpu=None,
        capture_hidden_mode=0,
        forward_mode=SimpleNamespace(is_target_verify=lambda: False),
    )


@pytest.mark.parametrize("release", EAGER)
def test_a_pass_with_log_probs_runs_without_a_graph(release: str, tmp_path: Path) -> None:
    file, name = EAGER[release]
    made = runner(release, file, tmp_path, name)
    made.max_num_tokens, made.capture_hidden_mode, made._is_full_backend = 64, 0, False
    made._has_inactive_dp_rank = lambda *_: False
    can_run = getattr(made(), name)
    assert can_run(batch(return_logprob=False)) is True
    assert can_run(batch(return_logprob=True)) is False


@pytest.mark.parametrize("release", TAIL)
@pytest.mark.parametrize("backend", Backend)
def test_a_graph_is_replayed_for_log_probs_only_if_the_logits_come_after_it(
    backend: Backend, release: str, tmp_path: Path
) -> None:
    names = ("can_replay_locally", "_uses_eager_prefill_tail")
    made = runner(release, "runner/prefill_cuda_graph_runner.py", tmp_path, *names)
    made.prefill_backend_name, made._is_full_backend = backend, backend is Backend.FULL
    made.has_mha_companion_layers, made.capture_hidden_mode, made._capture_req_slots = False, 0, 8
    made.max_num_tokens, made.capture_num_tokens = 64, [4]
    made.max_context_size = made.max_seq_len = made._captured_attn_metadata_max_bs = None
    made._qwen_bcg_hc_sidechannel = made._qwen_bcg_mtp_draft = made._fa4_prefill = False
    made._has_uncapturable_chunked_prefix = lambda *_: False
    made._pad_to_bucket = lambda *_: 4

    def replayed(*, return_logprob: bool) -> bool:
        nothing = dict.fromkeys(("input_embeds", "replace_embeds", "prefix_lens", "capture_hidden_mode"))
        return bool(
            made().can_replay_locally(
                batch_size=1, num_tokens=4, is_target_verify=False, return_logprob=return_logprob, **nothing
            )
        )

    assert replayed(return_logprob=False)
    assert replayed(return_logprob=True) == (backend is not Backend.TC_PIECEWISE)


@pytest.mark.parametrize("release", TAIL)
@pytest.mark.parametrize("backend", [Backend.BREAKABLE, Backend.FULL])
def test_the_logits_processor_runs_in_python_on_every_row_after_a_replay(
    backend: Backend, release: str, tmp_path: Path
) -> None:
    names = ("execute", "_execute_body_capture", "_uses_eager_prefill_tail")
    made = runner(release, "runner/prefill_cuda_graph_runner.py", tmp_path, *names)
    ours, padded = batch(return_logprob=True), batch(return_logprob=True)
    padded.input_ids, padded.attn_tp_sequence_sharded = [1, 2, 3, 4, 0, 0], False
    rows = list(range(6))
    layers, processed = SimpleNamespace(forward=None), []

    def forward(input_ids: list[int], positions: list[int], served: SimpleNamespace, **_: Any) -> str:
        """Do what every model's forward does: the layers, then the LogitsProcessor."""
        processed.append((layers.forward(input_ids, positions, served), served.return_logprob, len(served.input_ids)))
        return "output"

    self = MagicMock()
    self.prefill_backend_name, self._is_full_backend = backend, backend is Backend.FULL
    self.raw_num_tokens, self.layer_model, self.model_runner.model.forward = 4, layers, forward
    self.enable_cp_v2_bcg_capture = self.enable_cp_bcg_capture = self.is_dsv41_model = False
    self._use_draft_input_embeds, self._input_embeds_arg_idx = False, None
    self.buffer_registry.has_slot.return_value = False
    self.load_batch.return_value = padded if release == "0.5.18" else (padded, None)
    self._shape_key.return_value.variant_label = None
    self.backend.replay.return_value = rows
    self._restore_qwen_bcg_hc_output = self._finalize_execute_output = lambda output: output
    self.backend.replay_session = self.model_context = contextlib.nullcontext
    self._uses_eager_prefill_tail = lambda: made._uses_eager_prefill_tail(self)
    self._execute_body_capture = lambda *args, **named: made._execute_body_capture(self, *args, **named)
    assert made.execute(self, ours) == "output"
    self.backend.replay.assert_called_once()
    count = 4 if backend is Backend.FULL else 6  # breakable: padded tokens, with the real lengths beside them
    assert processed == [(rows[:count], True, count)]
