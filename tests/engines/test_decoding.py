"""Decoding: transformers gives the same figures token by token as in one prefill, and a fault of decoding shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from recorded import load, own_logits, record
from transformers import AttentionInterface, GenerationConfig, OpenAIGPTConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pytest_kld.captures.capture import Capture
from pytest_kld.errors import CaptureError, CorpusError, ModelError
from pytest_kld.figures.compare import compare
from pytest_kld.figures.scores import Summary
from pytest_kld.progress import Silent

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import MakeModel

    from pytest_kld.figures.scores import Scores
    from pytest_kld.text.windows import Windows


@pytest.fixture
def decoded(windows: Windows) -> Windows:
    """The three windows of 64 tokens, decoded two at a time after prompts of 16."""
    return windows.decoded(None, 2)


def scores_between(reference: Capture, candidate: Capture, windows: Windows) -> Scores:
    return compare(reference, candidate, windows, head="exact", device=torch.device("cpu"), progress=Silent())


def quantized_cache(backend: str, **settings: Any) -> dict[str, Any]:
    """Engine arguments for a model whose cache is quantized."""
    config = GenerationConfig(cache_implementation="quantized", cache_config={"backend": backend, **settings})
    return {"generation_config": config}


INT4 = quantized_cache("quanto", nbits=4, q_group_size=16, residual_length=1)
FP8 = quantized_cache("fp8")


@pytest.mark.parametrize("store", ["hidden", "logits", "logprobs"])
def test_decoding_agrees_with_prefill_in_float32(
    store: Any, reference_dir: Path, windows: Windows, decoded: Windows, tmp_path: Path
) -> None:
    prefilled = record(reference_dir, windows, tmp_path / "prefill", store=store)
    stepped = record(reference_dir, decoded, tmp_path / "decode", store=store)
    assert (prefilled.first_position, stepped.first_position) == (0, 16)
    kl = scores_between(prefilled, stepped, decoded).columns["kl"]
    assert kl.shape == (3, 48)
    assert kl.max() < 1e-6


def test_a_decoded_capture_holds_the_positions_after_the_prompt_in_their_order(
    reference_dir: Path, decoded: Windows, tmp_path: Path
) -> None:
    capture = record(reference_dir, decoded, tmp_path, store="logits")
    expected = own_logits(load(reference_dir), decoded)
    for window in range(decoded.count):
        torch.testing.assert_close(capture.rows(window, 16, 64), expected[window, 16:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(capture.rows(window, 40, 41), expected[window, 40:41], rtol=1e-4, atol=1e-4)
    assert capture.manifest["protocol"]["decoding"] == {"prompt_size": 16, "concurrency": 2}


def test_every_batch_has_as_many_sequences_as_asked_for(reference_dir: Path, decoded: Windows, tmp_path: Path) -> None:
    shapes: list[tuple[int, ...]] = []

    def alter(network: Any) -> Any:
        network.model.layers[0].mlp.register_forward_hook(lambda _, args, __: shapes.append(tuple(args[0].shape[:2])))
        return network

    record(reference_dir, decoded, tmp_path, store="logits", alter=alter)
    assert shapes == 2 * [(2, 16), *48 * [(2, 1)]]


def test_generation_settings_of_a_model_do_not_change_what_is_measured(
    reference_dir: Path, decoded: Windows, tmp_path: Path
) -> None:
    plain = record(reference_dir, decoded, tmp_path / "plain")
    eager = GenerationConfig(eos_token_id=list(range(1000)), repetition_penalty=3.0, do_sample=True, max_length=20)
    told = record(reference_dir, decoded, tmp_path / "told", arguments={"generation_config": eager})
    assert plain.digest == told.digest


def test_a_model_without_a_cache_cannot_be_decoded(make_model: MakeModel, decoded: Windows, tmp_path: Path) -> None:
    config = OpenAIGPTConfig(vocab_size=1024, n_positions=128, n_embd=32, n_layer=1, n_head=2)
    model = make_model("no-cache", config)
    record(model, decoded.prefilled(), tmp_path / "prefill")
    with pytest.raises(ModelError, match=r"at position 16 it ran 17 tokens instead of one, so it has no cache"):
        record(model, decoded, tmp_path / "decode")


@pytest.mark.parametrize(("prompt", "size"), [(63, 64), (64, 64), (1000, 64), (None, 2)])
def test_a_prompt_that_leaves_no_continuation_is_refused(windows: Windows, prompt: int | None, size: int) -> None:
    from dataclasses import replace

    with pytest.raises(CorpusError, match="leaves no decode step that predicts a token"):
        replace(windows, token_ids=windows.token_ids[:, :size]).decoded(prompt, 8)


def test_captures_of_two_paths_are_not_taken_for_one_another(
    reference_dir: Path, windows: Windows, decoded: Windows, tmp_path: Path
) -> None:
    prefilled = record(reference_dir, windows, tmp_path / "prefill")
    stepped = record(reference_dir, decoded, tmp_path / "decode")
    with pytest.raises(CaptureError, match=r"was made by prefill, but decoding \(prompts of 16 "):
        Capture.open(prefilled.path, decoded)
    with pytest.raises(CaptureError, match="--kld-concurrency"):
        Capture.open(stepped.path, windows.decoded(16, 3))
    with pytest.raises(CaptureError, match="one was decoded and the other was not"):
        scores_between(prefilled, stepped, windows)


@dataclass(frozen=True)
class Fault:
    """A fault of decoding: engine arguments of the candidate, and what the decode gate shows."""

    arguments: dict[str, Any]
    nan: bool = False


def _late(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
    """From the 41st key on, a decode step misses the first keys, as with a wrong tile size."""
    if query.shape[2] == 1 and key.shape[2] > 40:
        key, value, mask = key[:, :, 32:], value[:, :, 32:], None
    return sdpa_attention_forward(module, query, key, value, mask, **options)


def _crowded(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
    """One step of the last of two or more sequences is NaN; a sequence alone is right."""
    output, weights = sdpa_attention_forward(module, query, key, value, mask, **options)
    if query.shape[0] > 1 and query.shape[2] == 1 and key.shape[2] == 50:
        output[-1] = torch.nan
    return output, weights


AttentionInterface.register("late", _late)
AttentionInterface.register("crowded", _crowded)
FAULTS = {
    "a KV cache in FP8": Fault(FP8),
    "a KV cache in INT4": Fault(INT4),
    "an attention that goes wrong from a position on": Fault({"attn_implementation": "late"}),
    "a NaN under concurrency": Fault({"attn_implementation": "crowded"}, nan=True),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if "INT4" in name else []) for name in FAULTS],
)  # the library for INT4 compiles an extension on first use
def test_a_fault_of_decoding_passes_a_prefill_gate_and_shows_in_a_decode_gate(
    name: str, reference_dir: Path, windows: Windows, decoded: Windows, tmp_path: Path
) -> None:
    fault, figures = FAULTS[name], {}
    for path, run in (("prefill", windows), ("decode", decoded)):
        reference = record(reference_dir, run, tmp_path / f"{path}-reference")
        candidate = record(reference_dir, run, tmp_path / path, arguments=fault.arguments)
        figures[path] = Summary.of(scores_between(reference, candidate, run))
    assert figures["prefill"].max < 1e-6
    assert figures["prefill"].candidate_nan_count == 0
    assert figures["decode"].candidate_nan_count == (15 if fault.nan else 0)
    if not fault.nan:
        assert figures["decode"].mean > 1e-4


def test_a_sequence_alone_does_not_show_a_fault_of_concurrency(
    reference_dir: Path, windows: Windows, tmp_path: Path
) -> None:
    alone = windows.decoded(16, 1)
    reference = record(reference_dir, alone, tmp_path / "reference")
    candidate = record(reference_dir, alone, tmp_path / "candidate", arguments={"attn_implementation": "crowded"})
    assert scores_between(reference, candidate, alone).columns["kl"].max() < 1e-6
