from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from pairs import log_probs_of, scores_of
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from pytest_kld.diagnosis import Diagnosis, diagnose
from pytest_kld.figures.scores import Scores
from pytest_kld.text.tokens import Tokens

if TYPE_CHECKING:
    from pytest_kld.text.windows import Windows


@pytest.fixture
def scores(tmp_path: Path, reference_dir: Path, broken_dir: Path, windows: Windows) -> Scores:
    sides = (log_probs_of(AutoModelForCausalLM.from_pretrained(path), windows) for path in (reference_dir, broken_dir))
    return scores_of(tmp_path, windows, *sides)


@pytest.fixture
def diagnosis(scores: Scores, tokenizer: PreTrainedTokenizerFast) -> Diagnosis:
    return diagnose(scores, Tokens.of(tokenizer))


def test_the_worst_position_is_told_with_its_text(
    scores: Scores, diagnosis: Diagnosis, windows: Windows, tokenizer: PreTrainedTokenizerFast
) -> None:
    worst = diagnosis["worst_positions"][0]
    window, position = np.unravel_index(np.nanargmax(scores.columns["kl"]), scores.columns["kl"].shape)
    assert (worst["window"], worst["position"]) == (window, position)
    assert worst["source_position"] == windows.starts[window] + position
    assert worst["kl"] == scores.columns["kl"].max()
    ids = windows.token_ids[window]
    assert worst["context"] == tokenizer.decode(ids[max(0, position - 31) : position + 1])
    for said in diagnosis["worst_positions"]:
        label = said["label"]
        if said["position"] == windows.size - 1:
            assert label is said["label_text"] is said["delta_p"] is None
            continue
        assert label == windows.token_ids[said["window"], said["position"] + 1]
        assert said["label_text"] == tokenizer.decode([label])
        of_label = {
            side: {token["id"]: token["p"] for token in said[f"{side}_top"]}.get(label)
            for side in ("reference", "candidate")
        }
        if None not in of_label.values():
            assert said["delta_p"] == pytest.approx(of_label["candidate"] - of_label["reference"], abs=1e-5)


def test_the_first_of_the_top_tokens_are_the_argmaxes(scores: Scores, diagnosis: Diagnosis) -> None:
    for said in diagnosis["worst_positions"]:
        at = said["window"], said["position"]
        for side in ("reference", "candidate"):
            assert said[f"{side}_top"][0]["id"] == scores.columns[f"{side}_argmax"][at]
            assert len(said[f"{side}_top"]) == 5
    first = diagnosis["worst_positions"][0]
    at = first["window"], first["position"]
    assert first["reference_top"][0]["p"] == pytest.approx(scores.columns["reference_confidence"][at], rel=1e-5)


def test_groups_of_positions_add_up_to_all_of_them(scores: Scores, diagnosis: Diagnosis) -> None:
    kl = scores.columns["kl"]
    by_confidence = diagnosis["by_confidence"]
    assert sum(bucket["positions"] for bucket in by_confidence) == kl.size
    total = sum(bucket["positions"] * bucket["mean_kl"] for bucket in by_confidence if bucket["positions"])
    assert total == pytest.approx(kl.sum())
    by_position = diagnosis["by_position"]
    assert [bucket["start"] for bucket in by_position] == list(range(0, 64, 4))
    assert np.mean([bucket["mean_kl"] for bucket in by_position]) == pytest.approx(kl.mean())
    by_class = diagnosis["by_token_class"]
    assert sum(group["positions"] for group in by_class) == kl[:, :-1].size
    assert sum(group["share"] for group in by_class) == pytest.approx(1)


def test_windows_are_ordered_by_their_mean(scores: Scores, diagnosis: Diagnosis) -> None:
    means = scores.columns["kl"].mean(1)
    assert [window["window"] for window in diagnosis["worst_windows"]] == np.argsort(-means).tolist()
    assert diagnosis["worst_windows"][0]["mean_kl"] == pytest.approx(means.max())
    assert {window["start"] for window in diagnosis["worst_windows"]} == {0, 32, 64}


def test_share_of_the_worst_hundredth(scores: Scores, diagnosis: Diagnosis) -> None:
    kl = np.sort(scores.columns["kl"].ravel())
    assert diagnosis["top1pct_share"] == pytest.approx(kl[-2:].sum() / kl.sum())  # 2 of 192


def test_vocabulary_begins_with_what_loses_and_ends_with_what_gains(diagnosis: Diagnosis) -> None:
    contributions = [entry["contribution"] for entry in diagnosis["vocabulary"]]
    assert contributions == sorted(contributions, reverse=True)
    assert contributions[0] > 0 > contributions[-1]


def test_without_a_tokenizer_there_are_ids(scores: Scores, diagnosis: Diagnosis) -> None:
    bare = diagnose(scores)
    assert bare["by_token_class"] == []
    worst = bare["worst_positions"][0]
    assert worst["context"] is worst["label_text"] is worst["reference_top"][0]["text"] is None
    assert [said["kl"] for said in bare["worst_positions"]] == [said["kl"] for said in diagnosis["worst_positions"]]


def test_without_evidence_the_table_alone_is_described(scores: Scores, diagnosis: Diagnosis) -> None:
    bare = diagnose(replace(scores, evidence={}))
    assert bare["vocabulary"] == []
    assert bare["worst_positions"][0]["reference_top"] == []
    assert [said["kl"] for said in bare["worst_positions"]] == [said["kl"] for said in diagnosis["worst_positions"]]


def test_positions_that_a_table_leaves_out_keep_their_numbers(scores: Scores, diagnosis: Diagnosis) -> None:
    columns = {name: column[:, 10:] for name, column in scores.columns.items()}
    skipping = diagnose(replace(scores, columns=columns, about={**scores.about, "skip_first": 10}))
    kept = [said for said in diagnosis["worst_positions"] if said["position"] >= 10]
    found = {(said["window"], said["position"]): said for said in skipping["worst_positions"]}
    for said in kept:
        same = found[said["window"], said["position"]]
        assert same["source_position"] == said["source_position"]
        assert [token["id"] for token in same["candidate_top"]] == [token["id"] for token in said["candidate_top"]]
    assert skipping["by_position"][0]["start"] == 10


def test_a_diagnosis_is_plain_json(diagnosis: Diagnosis) -> None:
    assert json.loads(json.dumps(diagnosis)) == diagnosis
