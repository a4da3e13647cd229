"""What is kept of the logits, against float64 numpy on all of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from pairs import log_probs_of, scores_of
from transformers import AutoModelForCausalLM

from pytest_kld.figures import evidence
from pytest_kld.figures.scores import Scores

if TYPE_CHECKING:
    from pytest_kld.text.windows import Windows


def log_softmax(z: np.ndarray) -> np.ndarray:
    return z - np.logaddexp.reduce(z, axis=1, keepdims=True)


@pytest.fixture
def sides(reference_dir: Path, candidate_dir: Path, windows: Windows) -> list[torch.Tensor]:
    return [
        log_probs_of(AutoModelForCausalLM.from_pretrained(path), windows) for path in (reference_dir, candidate_dir)
    ]


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, windows: Windows, sides: list[torch.Tensor]) -> Scores:
    """Scores with every position in the sample."""
    monkeypatch.setattr(evidence, "_LEAST_SAMPLED", windows.token_ids.size)
    return scores_of(tmp_path, windows, *sides)


def test_the_worst_rows_are_kept_once_per_place_in_the_text(
    scores: Scores, windows: Windows, sides: list[torch.Tensor]
) -> None:
    worst = scores.evidence["worst"]
    kl = scores.columns["kl"]
    at_worst = [kl[window, position] for window, position in worst]
    places = [windows.starts[window] + position for window, position in worst]
    assert at_worst == sorted(at_worst, reverse=True)
    assert at_worst[0] == kl.max()
    assert len(set(places)) == len(places) == evidence.WORST
    for (window, position), ids, p in zip(
        worst, scores.evidence["candidate_top_ids"], scores.evidence["candidate_top_p"], strict=True
    ):
        row = np.exp(sides[1][window, position].double().numpy())
        assert ids.tolist() == np.argsort(-row, kind="stable")[:5].tolist()
        np.testing.assert_allclose(p, row[ids], rtol=1e-5)


def test_figures_of_the_vocabulary_match_float64(scores: Scores, sides: list[torch.Tensor]) -> None:
    log_p, log_q = (log_softmax(side.double().numpy().reshape(-1, side.shape[-1])) for side in sides)
    stored = scores.evidence
    assert len(stored["sampled"]) == len(log_p)
    contribution = (np.exp(log_p) * (log_p - log_q)).mean(0)
    difference = log_q - log_p
    difference -= difference.mean(1, keepdims=True)
    ids = stored["vocabulary_ids"]
    np.testing.assert_allclose(stored["contribution"], contribution[ids], atol=1e-7)
    np.testing.assert_allclose(stored["shift"], difference.mean(0)[ids], atol=1e-5)
    np.testing.assert_allclose(stored["shift_deviation"], difference.std(0)[ids], rtol=1e-3)
    np.testing.assert_allclose(stored["shift_scale"], 1.4826 * np.median(np.abs(difference.mean(0))), rtol=1e-3)
    assert contribution.sum() == pytest.approx(scores.columns["kl"].mean())
    assert {int(contribution.argmax()), int(contribution.argmin())} <= set(ids.tolist())


def test_figures_of_sampled_rows_match_float64(scores: Scores, sides: list[torch.Tensor]) -> None:
    log_p, log_q = (log_softmax(side.double().numpy().reshape(-1, side.shape[-1])) for side in sides)
    x, y = (log - log.mean(1, keepdims=True) for log in (log_p, log_q))
    slope = [np.polyfit(one, other, 1)[0] for one, other in zip(x, y, strict=True)]
    log_t = log_softmax(np.array(slope)[:, None] * log_p)
    np.testing.assert_allclose(scores.evidence["slope"], slope, rtol=1e-5)
    np.testing.assert_allclose(scores.evidence["kl"], scores.columns["kl"].ravel(), atol=1e-6)
    np.testing.assert_allclose(scores.evidence["tempered_kl"], (np.exp(log_t) * (log_t - log_q)).sum(1), atol=1e-6)


def test_rows_that_are_not_finite_are_not_looked_at(
    tmp_path: Path, windows: Windows, sides: list[torch.Tensor]
) -> None:
    sides[1][:, 30:] = torch.nan
    stored = scores_of(tmp_path, windows, *sides).evidence
    assert len(stored["sampled"]) == 3 * 30
    assert stored["sampled"][:, 1].max() == stored["worst"][:, 1].max() == 29
    assert all(np.isfinite(array).all() for array in stored.values())


def test_tokens_that_the_candidate_rules_out_count_as_e_to_the_minus_60(
    tmp_path: Path, windows: Windows, sides: list[torch.Tensor]
) -> None:
    sides[1][:, :, 7] = -torch.inf
    stored = scores_of(tmp_path, windows, *sides).evidence
    assert np.isfinite(stored["contribution"]).all()
    assert 7 in stored["vocabulary_ids"]


def test_a_pair_without_one_finite_position_has_empty_evidence(
    tmp_path: Path, windows: Windows, sides: list[torch.Tensor]
) -> None:
    stored = scores_of(tmp_path, windows, sides[0], torch.full_like(sides[1], torch.nan)).evidence
    assert stored["worst"].shape == stored["sampled"].shape == (0, 2)
    assert stored["reference_top_ids"].shape == (0, 5)


def test_evidence_is_saved_with_the_scores_and_sealed(tmp_path: Path, scores: Scores) -> None:
    scores.save(tmp_path / "scores.safetensors")
    loaded = Scores.load(tmp_path / "scores.safetensors").evidence
    assert loaded.keys() == scores.evidence.keys()
    for name, array in scores.evidence.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)
