"""Where positions are in their texts, whatever the order of the windows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks import coverage, real_text
from pytest_kld.figures.positions import Positions
from pytest_kld.figures.profile import profile_of
from pytest_kld.figures.scores import COLUMNS, Scores
from pytest_kld.figures.uncertainty import Blocks, intervals


def shuffled(scores: Scores, order: Any) -> Scores:
    """The same table with its windows in another order, marked as spread."""
    windows, size = scores.columns["kl"].shape
    stride = scores.about["protocol"]["stride"]
    protocol = {**scores.about["protocol"], "windows_from": "spread", "window_size": size}
    protocol["datasets"] = [{"dataset": "a text", "windows": windows}]
    return Scores(
        columns={name: column[order] for name, column in scores.columns.items()},
        about={**scores.about, "protocol": protocol},
        evidence={"starts": np.arange(windows)[order] * stride},
    )


def test_the_order_of_windows_changes_no_interval() -> None:
    rng = np.random.default_rng(0)
    scores = coverage.simulate(rng, 24, size=512, stride=128)
    other = shuffled(scores, rng.permutation(24))
    for name, interval in intervals(scores, 0.95).items():
        assert intervals(other, 0.95)[name].to_json() == pytest.approx(interval.to_json()), name


def test_the_order_of_windows_changes_neither_places_nor_charts_along_the_text() -> None:
    rng = np.random.default_rng(1)
    scores = coverage.simulate(rng, 12, size=64, stride=16)
    order = rng.permutation(12)
    other = shuffled(scores, order)
    ordered = shuffled(scores, np.arange(12))
    assert profile_of(other)["text"] == profile_of(ordered)["text"]
    for one, windows in ((other, order), (ordered, np.arange(12))):
        positions = Positions.of(one)
        assert (positions.text == 0).all()
        assert (positions.source == windows[:, None] * 16 + np.arange(64)).all()


def test_gaps_between_windows_are_no_text() -> None:
    """Three windows of 8 that begin at 100, 40 and 44 score 20 tokens: 4 of the last are shared."""
    table = {name: np.zeros((3, 8), dtype) for name, dtype in COLUMNS.items()}
    protocol = {"windows": 3, "window_size": 8, "stride": 4, "windows_from": "spread"}
    about = {"protocol": {**protocol, "datasets": [{"dataset": "a text", "windows": 3}]}}
    scores = Scores(columns=table, about=about, evidence={"starts": np.array([100, 40, 44])})
    blocks = Blocks.cut(scores)
    assert blocks.tokens == 20
    half = blocks.length // 2
    assert (blocks.half_of == (np.array([12, 0, 4])[:, None] + np.arange(8)) // half).all()


def test_each_dataset_keeps_its_starts() -> None:
    scores = shuffled(coverage.simulate(np.random.default_rng(2), 6, size=32, stride=32), [3, 0, 1, 2, 5, 4])
    datasets = [{"dataset": "a", "windows": 2}, {"dataset": "b", "windows": 4}]
    scores = replace(scores, about={"protocol": {**scores.about["protocol"], "datasets": datasets}})
    assert Positions.of(scores).text.tolist() == [0, 0, 1, 1, 1, 1]
    tables = scores.by_dataset()
    assert tables["a"].evidence["starts"].tolist() == [96, 0]
    assert tables["b"].evidence["starts"].tolist() == [32, 64, 160, 128]


def test_windows_that_a_project_gives_are_placed_where_they_begin() -> None:
    """Without a word about their origin, windows whose starts do not increase are from different texts."""
    table = {name: np.zeros((4, 8), dtype) for name, dtype in COLUMNS.items()}
    about = {"protocol": {"windows": 4, "window_size": 8, "stride": 4}}
    scores = Scores(columns=table, about=about, evidence={"starts": np.array([0, 6, 0, 0])})
    assert Positions.of(scores).text.tolist() == [0, 0, 1, 2]
    assert Blocks.cut(scores).tokens == 14 + 8 + 8


def test_spread_windows_show_the_whole_of_a_text_whose_topics_change() -> None:
    """The real-text benchmark on a made text: its second half is four times as hard as its first."""
    rng = np.random.default_rng(3)
    windows = 200
    scores = coverage.simulate(rng, windows, size=real_text.SIZE, stride=real_text.SIZE)
    scores.columns["kl"][windows // 2 :] *= 4
    protocol = {**scores.about["protocol"], "datasets": [{"dataset": "a text", "windows": windows}]}
    rows = real_text.coverage_of_text(replace(scores, about={"protocol": protocol}))
    for count in real_text.COUNTS:
        assert rows["mean", count, "spread"]["sets"] == windows // count
        assert rows["mean", count, "start"]["sets"] > 100
        assert rows["mean", count, "spread"]["covered"] > 0.8
        assert rows["mean", count, "start"]["covered"] < 0.5
