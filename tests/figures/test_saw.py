"""What a gate saw: counts against plain loops over a small made-up table, and the sentences of what it did not see."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pytest_kld.figures.saw import never_met, script_of, what_was_seen
from pytest_kld.figures.scores import Scores
from pytest_kld.text.tokens import Tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

WORDS = ["a", " b", "12", " ", "(", "д", "字", "é", "ア", "<end>"]
IDS = np.array([[0, 1, 2, 3, 4, 5], [3, 4, 5, 6, 7, 8]], np.int32)
"""Two windows of six tokens at stride 3."""


def words(ids: Sequence[int]) -> str:
    return "".join(WORDS[token_id] for token_id in ids)


TOKENS = Tokens(words, frozenset({9}))


def made_scores(engine: dict[str, Any] | None = None, skip: int = 0, **about: Any) -> Scores:
    shape = IDS.shape
    nll = np.ones(shape)
    flags = np.zeros(shape, np.uint8)
    flags[:, -1] = 4  # no label
    flags[0, 1] = 2  # the candidate is not finite
    columns = {
        "kl": np.where(flags & 2, np.nan, 0.1),
        **dict.fromkeys(("reference_nll", "candidate_nll", "reference_entropy", "reference_confidence"), nll),
        "reference_argmax": np.tile(np.array([1, 1, 2, 1, 1, 1], np.int32), (2, 1)),
        "candidate_argmax": np.zeros(shape, np.int32),
        "reference_cut_mass": np.zeros(shape),
        "candidate_cut_mass": np.zeros(shape),
        "token_ids": IDS,
        "flags": flags,
    }
    part = {"dataset": "text", "text_sha256": "0", "windows": 2}
    protocol = {**part, "window_size": 6, "stride": 3, "datasets": [part]}
    side = {"key": {"engine": engine}, "runtime": {}, "facts": {"context_length": 6}}
    described = {"reference": side, "candidate": {**side, **about}, "protocol": protocol, "vocab_size": 10}
    return Scores(columns=columns, about=described).without_first(skip)


def test_positions_places_and_vocabulary_are_counted() -> None:
    saw = what_was_seen(made_scores(), ["prefill"], TOKENS)
    assert saw["positions"] == {
        "counted": 11,
        "distinct": 8,  # nine tokens of text, of which the candidate is not finite at one
        "windows": 2,
        "first": 0,
        "last": 5,
        "context_length": 6,
    }
    assert saw["vocabulary"] == {"size": 10, "labels": 7, "top1": 2}  # ids 1 and 3 to 8
    assert sum(saw["token_classes"].values()) == 9


def test_labels_are_counted_by_class_and_by_script() -> None:
    saw = what_was_seen(made_scores(), ["prefill"], TOKENS)
    labels = [1, 3, 4, 5, 4, 5, 6, 7, 8]
    assert saw["token_classes"] == {
        name: sum(TOKENS.class_of(label) == name for label in labels) for name in saw["token_classes"]
    }
    assert saw["scripts"] == {"Latin": 2, "Cyrillic": 2, "Han": 1, "Katakana": 1}
    assert list(saw["scripts"])[:2] in (["Latin", "Cyrillic"], ["Cyrillic", "Latin"])


@pytest.mark.parametrize(
    ("letter", "script"),
    [
        ("a", "Latin"),
        ("ß", "Latin"),
        ("Ж", "Cyrillic"),
        ("λ", "Greek"),
        ("字", "Han"),
        ("の", "Hiragana"),
        ("한", "Hangul"),
    ],
)
def test_scripts_have_their_usual_names(letter: str, script: str) -> None:
    assert script_of(letter) == script


def test_without_a_tokenizer_there_are_no_classes() -> None:
    saw = what_was_seen(made_scores(), ["prefill"])
    assert saw["token_classes"] == saw["scripts"] == {}


TRANSFORMERS = {"engine": "transformers", "versions": {"transformers": "5"}, "devices": ["cpu AVX2"], "arguments": {}}
SERVED = {"engine": "sglang", "versions": {"sglang": "0.5.23"}, "devices": ["H200"], "arguments": []}


def test_a_prefill_has_not_seen_decoding_nor_the_cache_nor_sequences_together() -> None:
    saw = what_was_seen(made_scores(TRANSFORMERS), ["prefill"], TOKENS)
    assert saw["unseen"][:3] == [
        "no decoding",
        "no key or value read back from the KV cache (reference and candidate)",
        "no two sequences together",
    ]
    assert "3 of 10 tokens never occurred as label" in saw["unseen"]


def test_decoding_reads_the_cache() -> None:
    saw = what_was_seen(made_scores(TRANSFORMERS), ["decode"], TOKENS)
    assert saw["kv_cache"]["candidate"]["read"] is True
    assert not [text for text in saw["unseen"] if "cache" in text or text == "no decoding"]


@pytest.mark.parametrize(("chunk", "read"), [(2, True), (6, False), (8192, False), (-1, False)])
def test_a_chunked_prefill_reads_the_cache_if_a_window_has_several_chunks(chunk: int, read: bool) -> None:
    runtime = {"kv_cache_dtype": "fp8_e4m3", "chunked_prefill_size": chunk}
    saw = what_was_seen(made_scores(SERVED, runtime=runtime), ["prefill"], TOKENS)
    assert saw["kv_cache"]["candidate"] == {"dtype": "fp8_e4m3", "chunk": None if chunk < 0 else chunk, "read": read}
    assert saw["kv_cache"]["reference"]["read"] is None


def test_what_cannot_be_known_is_not_claimed() -> None:
    saw = what_was_seen(made_scores(None, facts={"context_length": None}), ["prefill"], TOKENS)
    assert saw["concurrency"] is None
    assert saw["engines"]["candidate"] == {"engine": None, "version": None, "devices": [], "backends": {}}
    assert "no position beyond 6" in saw["unseen"]
    assert not [text for text in saw["unseen"] if "cache" in text or "together" in text]


def test_a_longer_context_and_skipped_positions_are_named() -> None:
    saw = what_was_seen(made_scores(skip=2, facts={"context_length": 4096}), ["prefill"], TOKENS)
    assert (saw["positions"]["first"], saw["positions"]["last"]) == (2, 5)
    assert "no position beyond 6, of 4,096 that the candidate supports" in saw["unseen"]
    assert "no position before 2" in saw["unseen"]


def test_experts_that_were_never_met_are_named_by_layer_and_only_a_few() -> None:
    layers = [{"layer": 1, "never": [3], "few": 0, "changed": None}, {"layer": 4, "never": [0, 7]}]
    assert never_met({"experts": 16, "layers": layers}) == ["3 of 16 experts never met (layer:expert 1:3, 4:0, 4:7)"]
    assert never_met({"experts": 16, "layers": [{"layer": 1, "never": []}]}) == []
    (many,) = never_met({"experts": 1600, "layers": [{"layer": 1, "never": list(range(100))}]})
    assert many.startswith("100 of 1,600 experts never met (layer:expert 1:0, 1:1, ")
    assert many.endswith(", …)")
