"""Intervals of paired differences, against simulations and plain numpy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pytest_kld.errors import ScoresError
from pytest_kld.figures.paired import paired_intervals
from pytest_kld.figures.scores import Scores, Summary
from pytest_kld.figures.uncertainty import intervals

WINDOWS, SIZE = 40, 64


def table(kl: np.ndarray, argmax: np.ndarray, datasets: int = 1) -> Scores:
    """A table with this KL and these most probable tokens of the candidate."""
    parts = [
        {"dataset": f"text {part}", "text_sha256": "0", "windows": len(kl) // datasets} for part in range(datasets)
    ]
    zeros = np.zeros(kl.shape)
    columns = {
        "kl": kl,
        **dict.fromkeys(("reference_nll", "reference_entropy", "reference_confidence"), zeros + 0.7),
        "candidate_nll": kl + 0.7,
        "reference_argmax": np.zeros(kl.shape, int),
        "candidate_argmax": argmax,
        **dict.fromkeys(("reference_cut_mass", "candidate_cut_mass"), zeros),
        "token_ids": np.arange(kl.size).reshape(kl.shape) % 997,
        "flags": np.zeros(kl.shape, np.uint8),
    }
    protocol: dict[str, Any] = {
        "stride": kl.shape[1],
        "window_size": kl.shape[1],
        "windows": len(kl),
        "datasets": parts,
    }
    return Scores(columns=columns, about={"protocol": protocol})


def pair(seed: int, *, loss: float, datasets: int = 1) -> tuple[Scores, Scores]:
    """Two results of one text: the same hard positions, and a little more KL now."""
    random = np.random.default_rng(seed)
    shape = (WINDOWS, SIZE)
    before = random.lognormal(-4, 1, shape)
    now = before * (1 + loss * random.exponential(1, shape))
    wrong = random.random(shape) < 0.1
    return table(now, wrong | (random.random(shape) < loss), datasets), table(before, wrong, datasets)


def test_the_interval_is_around_the_difference_and_narrower_than_two_intervals() -> None:
    now, before = pair(0, loss=0.05)
    found = paired_intervals(now, before, 0.95)
    difference = float(np.mean(now.columns["kl"] - before.columns["kl"]))
    assert found["mean"].low < difference < found["mean"].high
    assert found["mean"].low > 0  # the loss is certain,
    alone = [intervals(scores, 0.95)["mean"] for scores in (now, before)]
    assert alone[0].low < alone[1].high  # which the two results by themselves do not show
    assert found["top1_agreement"].high < 0


def test_intervals_of_a_difference_contain_the_truth_as_often_as_they_claim() -> None:
    truth = 0.05 * float(np.exp(-4 + 0.5))
    hits = 0
    for seed in range(200):
        interval = paired_intervals(*pair(seed, loss=0.05), 0.9)["mean"]
        hits += interval.low <= truth <= interval.high
    assert 0.82 <= hits / 200 <= 0.96


def test_equal_results_differ_by_exactly_nothing() -> None:
    now, _ = pair(0, loss=0.05)
    found = paired_intervals(now, now, 0.95)
    assert (found["mean"].low, found["mean"].high) == (0.0, 0.0)


def test_several_datasets_give_the_interval_of_the_average_difference() -> None:
    now, before = pair(1, loss=0.05, datasets=2)
    interval = paired_intervals(now, before, 0.95)["mean"]
    means = [
        Summary.macro_average([Summary.of(part) for part in scores.by_dataset().values()]).mean
        for scores in (now, before)
    ]
    assert interval.low < means[0] - means[1] < interval.high


def test_each_dataset_counts_equally_in_the_average_difference() -> None:
    """The first text lost nothing, so its own interval would be [0, 0]."""
    now, before = pair(1, loss=0.05, datasets=2)
    kl = np.concatenate([before.columns["kl"][: WINDOWS // 2], now.columns["kl"][WINDOWS // 2 :]])
    interval = paired_intervals(replace(now, columns={**now.columns, "kl": kl}), before, 0.95)["mean"]
    difference = (kl - before.columns["kl"])[WINDOWS // 2 :].mean() / 2
    assert 0 < interval.low < difference < interval.high


def test_other_tokens_are_refused() -> None:
    now, before = pair(0, loss=0.05)
    other = replace(before, columns={**before.columns, "token_ids": before.columns["token_ids"] + 1})
    with pytest.raises(ScoresError, match="other tokens"):
        paired_intervals(now, other, 0.95)


def test_infinite_figures_on_both_sides_have_no_interval() -> None:
    now, before = pair(0, loss=0.05)
    for scores in (now, before):
        scores.columns["kl"][3, 5] = np.inf
    assert np.isnan(paired_intervals(now, before, 0.95)["mean"].low)
