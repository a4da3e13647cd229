"""Scores and their Summary, held against numpy."""

from __future__ import annotations

import json
import math
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_kld.errors import CacheError, ScoresError
from pytest_kld.figures.scores import COLUMNS, Scores, Summary
from pytest_kld.figures.table_shape import has_shape

if TYPE_CHECKING:
    from pathlib import Path

NO_LABEL = 4
BAD_REFERENCE, BAD_CANDIDATE = 1, 2


def make_scores(windows: int = 3, positions: int = 50, seed: int = 0) -> Scores:
    """A table as `compare` makes it: the last position of each window has no label."""
    generator = np.random.default_rng(seed)
    shape = (windows, positions)
    columns: dict[str, Any] = {
        "kl": generator.exponential(0.01, shape),
        "reference_nll": generator.exponential(2, shape),
        "candidate_nll": generator.exponential(2.1, shape),
        "reference_entropy": generator.exponential(2, shape),
        "reference_confidence": generator.uniform(0, 1, shape),
        "reference_argmax": generator.integers(0, 3, shape, dtype=np.int32),
        "candidate_argmax": generator.integers(0, 3, shape, dtype=np.int32),
        "token_ids": generator.integers(0, 99, shape, dtype=np.int32),
        "reference_cut_mass": np.zeros(shape),
        "candidate_cut_mass": generator.uniform(0, 0.02, shape),
        "flags": np.zeros(shape, np.uint8),
    }
    columns["flags"][:, -1] = NO_LABEL
    columns["reference_nll"][:, -1] = columns["candidate_nll"][:, -1] = np.nan
    sides = {side: {"model": "Référence", "digest": side} for side in ("reference", "candidate")}
    protocol = {"dataset": "text", "datasets": [{"dataset": "text", "windows": windows}]}
    return Scores(columns=columns, about={**sides, "protocol": protocol, "head": "exact"})


def flag(scores: Scores, positions: list[tuple[int, int]], bit: int) -> None:
    for position in positions:
        scores.columns["flags"][position] |= bit
        own = ("reference_nll", "reference_confidence") if bit == BAD_REFERENCE else ("candidate_nll",)
        for name in ("kl", *own):
            scores.columns[name][position] = np.nan


def test_cut_mass_is_the_largest_of_both_sides_over_valid_positions() -> None:
    scores = make_scores()
    scores.columns["reference_cut_mass"][1, 3] = 0.4
    assert Summary.of(scores).cut_mass == 0.4
    flag(scores, [(1, 3)], BAD_CANDIDATE)
    assert Summary.of(scores).cut_mass == scores.columns["candidate_cut_mass"].max() < 0.02
    assert Summary.macro_average([Summary.of(scores), Summary.of(make_scores(1, 4))]).cut_mass == (
        max(Summary.of(scores).cut_mass, Summary.of(make_scores(1, 4)).cut_mass)
    )


def test_every_figure_agrees_with_numpy() -> None:
    scores = make_scores()
    summary, columns = Summary.of(scores), scores.columns
    kl = columns["kl"].ravel()
    assert (summary.positions, summary.skipped) == (150, 0)
    assert summary.coverage == 1
    assert summary.mean == pytest.approx(kl.mean(), rel=1e-14)
    quantiles = [summary.median, summary.p90, summary.p95, summary.p99, summary.p999]
    np.testing.assert_allclose(quantiles, np.quantile(kl, [0.5, 0.9, 0.95, 0.99, 0.999]), rtol=1e-14)
    assert summary.max == kl.max()
    assert summary.top1_agreement == (columns["reference_argmax"] == columns["candidate_argmax"]).mean()
    changes = (columns["reference_argmax"] != columns["candidate_argmax"])[columns["reference_confidence"] > 0.5]
    assert 0 < changes.sum() < changes.size
    assert summary.flips == pytest.approx(changes.mean(), rel=1e-14)
    nlls = [columns[f"{side}_nll"][:, :-1] for side in ("reference", "candidate")]
    np.testing.assert_allclose([summary.reference_ppl, summary.candidate_ppl], [np.exp(n.mean()) for n in nlls])
    assert summary.ppl_ratio == pytest.approx(summary.candidate_ppl / summary.reference_ppl)
    assert summary.log_ppl_ratio == pytest.approx(math.log(summary.ppl_ratio))
    probabilities = [np.exp(-n) for n in nlls]
    assert summary.rms_delta_p == pytest.approx(np.sqrt(((probabilities[1] - probabilities[0]) ** 2).mean()))
    assert set(summary.to_json()) == set(Summary.__dataclass_fields__)


def test_nan_is_counted_apart_for_each_side_and_left_out_of_the_figures() -> None:
    scores = make_scores()
    flag(scores, [(0, 1), (1, 4)], BAD_REFERENCE)
    flag(scores, [(1, 4), (2, 0), (2, 49)], BAD_CANDIDATE)
    summary = Summary.of(scores)
    assert (summary.reference_nan_count, summary.candidate_nan_count) == (2, 3)
    assert summary.coverage == 146 / 150
    assert summary.mean == pytest.approx(np.nanmean(scores.columns["kl"]))
    assert summary.p99 == pytest.approx(np.nanquantile(scores.columns["kl"], 0.99))
    labelled = scores.columns["flags"] == 0
    assert summary.candidate_ppl == pytest.approx(np.exp(scores.columns["candidate_nll"][labelled].mean()))


@pytest.mark.parametrize("bit", [BAD_REFERENCE, BAD_CANDIDATE])
def test_nan_everywhere_is_an_error_and_not_a_figure(bit: int) -> None:
    scores = make_scores(1, 4)
    flag(scores, [(0, i) for i in range(4)], bit)
    with pytest.raises(ScoresError, match=r"no position .* is finite on both sides: of 4, .* in [40] .* in [40]"):
        Summary.of(scores)


def test_nan_at_every_position_with_a_label_is_an_error() -> None:
    scores = make_scores(1, 4)
    flag(scores, [(0, i) for i in range(3)], BAD_CANDIDATE)
    with pytest.raises(ScoresError, match="no position that has a next token"):
        Summary.of(scores)


def test_infinite_kl_is_counted_and_makes_the_mean_infinite() -> None:
    scores = make_scores(1, 200)
    scores.columns["kl"][0, 7] = math.inf
    summary = Summary.of(scores)
    assert (summary.infinite_count, summary.mean, summary.max) == (1, math.inf, math.inf)
    assert summary.p999 == math.inf  # between the last two order statistics
    ordered = np.sort(scores.columns["kl"][0])
    assert summary.p99 == pytest.approx(ordered[197] + 0.01 * (ordered[198] - ordered[197]))  # rank 0.99 · 199
    assert summary.median == pytest.approx(np.quantile(scores.columns["kl"], 0.5))


@pytest.mark.parametrize(("nll", "ppl"), [(700.0, math.exp(700)), (709.9, math.inf), (1e4, math.inf)])
def test_a_perplexity_too_large_for_a_float_is_infinite(nll: float, ppl: float) -> None:
    scores = make_scores()
    scores.columns["candidate_nll"][:] = nll
    assert Summary.of(scores).candidate_ppl == pytest.approx(ppl)


def test_a_label_that_both_sides_deem_impossible_gives_no_ratio() -> None:
    scores = make_scores()
    scores.columns["candidate_nll"][0, 0] = math.inf
    assert Summary.of(scores).ppl_ratio == math.inf
    scores.columns["reference_nll"][0, 0] = math.inf
    summary = Summary.of(scores)
    assert math.isnan(summary.ppl_ratio)  # and NaN is within no limit
    assert (summary.reference_ppl, summary.candidate_ppl) == (math.inf, math.inf)
    assert math.isfinite(summary.rms_delta_p)


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.floats(0, 1e6), min_size=2, max_size=40))
def test_quantiles_are_numpys_for_any_values(values: list[float]) -> None:
    scores = make_scores(1, len(values))
    scores.columns["kl"][0] = values
    summary = Summary.of(scores)
    for name, q in (("median", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99), ("p999", 0.999)):
        assert getattr(summary, name) == pytest.approx(np.quantile(values, q), rel=1e-12, abs=1e-300)


def test_quantiles_are_exact_beyond_sixteen_million_positions() -> None:
    """`torch.quantile` refuses that many."""
    count = 16_800_000
    ranks = np.arange(count).reshape(-1, 8).T  # not in order, and cheaper than a permutation
    column = np.zeros(ranks.shape, np.int32)
    nll = np.ones(ranks.shape)
    columns: dict[str, Any] = dict.fromkeys(COLUMNS, column)
    columns |= {"kl": ranks.astype(np.float64), "reference_nll": nll, "candidate_nll": nll}
    columns["flags"] = column.astype(np.uint8)
    summary = Summary.of(Scores(columns=columns, about={}))
    for value, q in ((summary.median, 0.5), (summary.p99, 0.99), (summary.p999, 0.999)):
        assert value == pytest.approx(q * (count - 1), abs=1e-6)
    assert (summary.max, summary.positions) == (count - 1, count)
    assert summary.mean == pytest.approx((count - 1) / 2, rel=1e-12)


def test_a_table_survives_the_round_trip(tmp_path: Path) -> None:
    scores = make_scores()
    flag(scores, [(0, 1)], BAD_CANDIDATE)
    scores.columns["kl"][1, 1] = math.inf
    scores.save(tmp_path / "scores" / "a.safetensors")
    loaded = Scores.load(tmp_path / "scores" / "a.safetensors")
    assert loaded.about == scores.about
    for name, dtype in COLUMNS.items():
        assert loaded.columns[name].dtype == dtype
        np.testing.assert_array_equal(loaded.columns[name], scores.columns[name])
    assert [path.name for path in (tmp_path / "scores").iterdir()] == ["a.safetensors"]


def test_any_flipped_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    make_scores(1, 5).save(path)
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    assert json.loads(whole[8:header])
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(ScoresError, match=r"a\.safetensors is corrupt .*delete it or pass --kld-refresh"):
            Scores.load(path)


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_truncated_table_is_an_error(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    make_scores(1, 5).save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ScoresError, match=r"a\.safetensors is corrupt"):
        Scores.load(path)


def test_a_missing_table_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ScoresError, match=r"a\.safetensors"):
        Scores.load(tmp_path / "a.safetensors")


def test_a_table_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"cannot write .*a\.safetensors"):
        make_scores().save(tmp_path / "file" / "a.safetensors")


def test_a_side_is_named_with_its_engine_and_path() -> None:
    scores = make_scores()
    scores.about["candidate"]["key"] = {"engine": {"engine": "sglang"}, "path": "decode"}
    ours, theirs = scores.subject("candidate"), scores.subject("reference")
    assert (ours.name, ours.engine, ours.path) == ("Référence", "sglang", "decode")
    assert (theirs.name, theirs.engine, theirs.path) == ("Référence", "", "prefill")


def test_a_quantile_among_infinities_is_infinite_and_one_just_below_them_is_not() -> None:
    scores = make_scores(1, 11)
    scores.columns["kl"][0, 5:] = np.inf
    summary = Summary.of(scores)
    assert (summary.median, summary.p90, summary.p99) == (math.inf, math.inf, math.inf)
    scores.columns["kl"][0] = [*range(6), *[np.inf] * 5]
    assert Summary.of(scores).median == 5  # of eleven it is the sixth, and the seventh has no weight


def test_a_flip_counts_only_above_even_confidence() -> None:
    scores = make_scores(1, 4)
    scores.columns["reference_confidence"][0] = [0.5, 0.5, 0.75, 0.75]
    scores.columns["reference_argmax"][0] = 1
    scores.columns["candidate_argmax"][0] = [2, 2, 2, 1]
    assert Summary.of(scores).flips == 0.5


def test_each_dataset_has_its_own_protocol() -> None:
    scores = make_scores(3)
    parts = [{"dataset": "prose", "windows": 1}, {"dataset": "code", "windows": 2}]
    scores.about["protocol"] = {"dataset": "prose, code", "windows": 3, "stride": 8, "datasets": parts}
    found = {name: table.about["protocol"] for name, table in scores.by_dataset().items()}
    assert found == {part["dataset"]: {**part, "stride": 8, "datasets": [part]} for part in parts}


@pytest.mark.parametrize(
    ("change", "evidence", "good"),
    [
        ({}, {}, True),
        ({}, {"starts": np.zeros(3, int)}, True),
        ({}, {"starts": np.zeros(2, int)}, False),
        ({"decoding": {"prompt_size": 16}}, {}, True),
        ({"decoding": {"prompt_size": -1}}, {}, False),
        ({"decoding": ["prompt_size"]}, {}, False),
        ({"datasets": [{"dataset": "text", "windows": 2}]}, {}, False),
        ({"dataset": None}, {}, False),
    ],
)
def test_a_table_has_the_description_that_its_readers_rely_on(
    change: dict[str, Any], evidence: dict[str, Any], good: bool
) -> None:
    scores = make_scores(3)
    scores.about["protocol"].update(change)
    assert has_shape(scores.columns, scores.about, COLUMNS, evidence) is good
