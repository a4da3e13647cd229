"""The figures beyond KLD: computed from scores, checked against limits, absent if they were not computed."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pytest_kld.collecting.kld import KLD
from pytest_kld.errors import ScoresError
from pytest_kld.figures.compare import compare
from pytest_kld.figures.scores import EXTENDED_COLUMNS, Scores, Summary
from pytest_kld.gate.limits import LIMITS, needs_extended
from pytest_kld.gate.verdict import judge
from pytest_kld.measuring.measurement import Measurement
from pytest_kld.progress import Silent
from pytest_kld.subjects.subject import Subject

EXTENDED_FIGURES = (*EXTENDED_COLUMNS, "abs_entropy_difference")
RUN = ("--kld-dataset=python-docs", "--kld-windows=3", "--kld-window-size=64", "--kld-stride=32")


def make_scores(*, extended: bool = True, windows: tuple[int, ...] = (3,), positions: int = 8, seed: int = 0) -> Scores:
    """A table of several datasets with plausible values."""
    random = np.random.default_rng(seed)
    shape = (sum(windows), positions)
    columns: dict[str, Any] = {
        "kl": random.exponential(0.05, shape),
        "reference_nll": random.exponential(2, shape),
        "candidate_nll": random.exponential(2, shape),
        "reference_entropy": random.exponential(2, shape),
        "reference_confidence": random.uniform(0.1, 1, shape),
        "reference_argmax": random.integers(0, 3, shape, dtype=np.int32),
        "candidate_argmax": random.integers(0, 3, shape, dtype=np.int32),
        "token_ids": random.integers(0, 9, shape, dtype=np.int32),
        "reference_cut_mass": np.zeros(shape),
        "candidate_cut_mass": np.zeros(shape),
        "flags": np.zeros(shape, np.uint8),
    }
    columns["flags"][:, -1] = 4
    if extended:
        columns |= {name: random.uniform(0, 0.5, shape) for name in EXTENDED_COLUMNS}
        columns["entropy_difference"] -= 0.25
    datasets = [
        {"dataset": f"text-{i}", "text_sha256": f"{i:064}", "windows": count} for i, count in enumerate(windows)
    ]
    protocol = {"dataset": ", ".join(str(one["dataset"]) for one in datasets), "datasets": datasets}
    sides = {side: {"model": side, "digest": side} for side in ("reference", "candidate")}
    return Scores(columns=columns, about={**sides, "protocol": protocol})


def make_kld(scores: Scores, **bounds: float) -> KLD:
    return KLD(reference=Subject(name="reference"), candidate=Subject(name="candidate"), bounds=bounds, scores=scores)


def test_extended_figures_are_means_over_valid_positions() -> None:
    scores = make_scores()
    scores.columns["flags"][1, 2] = 2
    for name in EXTENDED_COLUMNS:
        scores.columns[name][1, 2] = math.nan
    summary = Summary.of(scores)
    valid = (scores.columns["flags"] & 3) == 0
    for name in EXTENDED_COLUMNS:
        assert getattr(summary, name) == pytest.approx(sum(scores.columns[name][valid]) / valid.sum())
    differences = scores.columns["entropy_difference"][valid]
    assert summary.abs_entropy_difference == pytest.approx(sum(map(abs, differences)) / valid.sum())


def test_flips_are_changes_where_the_reference_has_a_majority() -> None:
    scores = make_scores()
    changed = confident = 0
    for confidence, ours, theirs in zip(
        *(scores.columns[f"{name}"].flat for name in ("reference_confidence", "reference_argmax", "candidate_argmax")),
        strict=True,
    ):
        confident += confidence > 0.5
        changed += confidence > 0.5 and ours != theirs
    assert 0 < changed < confident
    assert Summary.of(scores).flips == pytest.approx(changed / confident)


def test_flips_do_not_exist_where_the_reference_is_confident_nowhere() -> None:
    scores = make_scores()
    scores.columns["reference_confidence"][:] = 0.5
    assert Summary.of(scores).flips is None
    with pytest.raises(ScoresError, match="max_flips cannot be checked: the reference is confident at no position"):
        make_kld(scores, max_flips=1)


def test_figures_that_were_not_computed_are_none_and_a_limit_on_one_is_an_error() -> None:
    scores = make_scores(extended=False)
    figures = Summary.of(scores).to_json()
    assert [figures[name] for name in EXTENDED_FIGURES] == [None] * len(EXTENDED_FIGURES)
    for name, limit in LIMITS.items():
        assert limit.extended == (limit.figure in EXTENDED_FIGURES)
        assert needs_extended({name: 0}) == limit.extended
        if limit.extended:
            with pytest.raises(ScoresError, match=f"{name} cannot be checked: .* give --kld-metrics=all"):
                judge(figures, {name: limit.greatest if limit.upper else 0})


def test_a_figure_that_was_not_computed_says_so_in_a_test() -> None:
    kld = make_kld(make_scores(extended=False))
    with pytest.raises(ScoresError, match=r"there is no kld\.js: .* give --kld-metrics=all"):
        _ = kld.js


def test_every_limit_bounds_a_figure_that_the_facade_has() -> None:
    kld = make_kld(make_scores())
    special = {"candidate_nan_count": "nan_count"}
    for limit in LIMITS.values():
        if limit.figure in ("decode_gap", "experts_seen"):  # of models that decode, and of those with experts
            continue
        value = getattr(kld, special.get(limit.figure, limit.figure))
        assert value == getattr(kld.summary, limit.figure)
        name = next(name for name, one in LIMITS.items() if one is limit)
        (check,) = judge(kld.summary.to_json(), {name: value}).checks
        assert check.passed
        (check,) = judge(kld.summary.to_json(), {name: value - 1e-3 if limit.upper else value + 1e-3}).checks
        assert not check.passed


def test_skipped_positions_are_in_no_figure_and_are_counted() -> None:
    scores = make_scores()
    scores.columns["kl"][:, :3] = 1e6
    scores.columns["flags"][0, 1] = 2
    summary = Summary.of(scores.without_first(3))
    kept = Scores(columns={name: column[:, 3:] for name, column in scores.columns.items()}, about=scores.about)
    expected = dataclasses.replace(Summary.of(kept), positions=24, skipped=9, coverage=15 / 24)
    assert summary == expected
    assert summary.max < 1e6
    assert summary.candidate_nan_count == 0


def test_what_is_skipped_twice_is_counted_twice() -> None:
    assert Summary.of(make_scores().without_first(1).without_first(2)) == Summary.of(make_scores().without_first(3))


def test_the_macro_average_gives_each_dataset_the_same_weight() -> None:
    scores = make_scores(windows=(1, 4))
    kld = make_kld(scores)
    assert list(kld.datasets) == ["text-0", "text-1"]
    small, large = kld.datasets.values()
    assert (small.positions, large.positions) == (8, 32)
    assert small.mean == pytest.approx(scores.columns["kl"][0].mean())
    assert large.p99 == pytest.approx(np.quantile(scores.columns["kl"][1:], 0.99))
    for field in dataclasses.fields(Summary):
        values = [getattr(summary, field.name) for summary in (small, large)]
        if None in values:  # figures of models that decode, and of those with experts
            assert getattr(kld.summary, field.name) is None, field.name
            continue
        expected = sum(values) / 2
        if field.name.endswith("_count") or field.name in ("positions", "skipped"):
            expected = sum(values)
        if field.name == "max":
            expected = max(values)
        assert getattr(kld.summary, field.name) == pytest.approx(expected), field.name


def test_a_figure_that_one_dataset_lacks_has_no_macro_average() -> None:
    scores = make_scores(windows=(2, 2))
    scores.columns["reference_confidence"][:2] = 0.2
    kld = make_kld(scores)
    assert kld.datasets["text-1"].flips is not None
    assert kld.summary.flips is None


def test_limits_hold_for_the_macro_average_and_for_each_dataset_if_asked_for() -> None:
    scores = make_scores(windows=(2, 2))
    scores.columns["kl"][:2], scores.columns["kl"][2:] = 0.02, 0.08
    average = make_kld(scores, max_mean=0.06).verdict()
    assert average.passed
    assert len(average.checks) == 1
    each = KLD(
        reference=Subject(name="reference"),
        candidate=Subject(name="candidate"),
        bounds={"max_mean": 0.06},
        scores=scores,
        each_dataset=True,
    ).verdict()
    assert [(check.dataset, check.passed) for check in each.checks] == [
        (None, True),
        ("text-0", True),
        ("text-1", False),
    ]
    assert "mean KLD on text-1 0.08 nats > max_mean 0.06" in str(each.checks[2])


@pytest.mark.parametrize("extended", [False, True])
def test_scores_come_back_from_their_file_with_the_columns_that_they_had(tmp_path: Path, extended: bool) -> None:
    scores = make_scores(extended=extended)
    scores.save(tmp_path / "scores")
    loaded = Scores.load(tmp_path / "scores")
    assert loaded.extended == extended
    assert set(loaded.columns) == set(scores.columns)
    for name, column in scores.columns.items():
        np.testing.assert_array_equal(loaded.columns[name], column)


def test_a_table_with_some_of_the_extended_columns_is_corrupt(tmp_path: Path) -> None:
    scores = make_scores()
    del scores.columns["tv"]
    scores.save(tmp_path / "scores")
    with pytest.raises(ScoresError, match="corrupt"):
        Scores.load(tmp_path / "scores")


def test_a_limit_by_marker_makes_the_second_pass_and_it_is_kept(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, reference_dir: Path, candidate_dir: Path, tmp_path: Path
) -> None:
    passes = []

    def counted(*args: Any, **options: Any) -> Scores:
        passes.append(options["extended"])
        return compare(*args, **options)

    monkeypatch.setattr("pytest_kld.measuring.scoring.compare", counted)
    run = (*RUN, f"--kld-ref={reference_dir}", f"--kld-candidate={candidate_dir}", f"--kld-cache-dir={tmp_path}")
    pytester.makepyfile("def test_plain(kld): assert kld.summary.js is None")
    pytester.runpytest(*run).assert_outcomes(passed=1)
    pytester.makepyfile(
        """
        import pytest
        @pytest.mark.kld(max_js=0.5, min_top5=0.1)
        def test_marked(kld): assert 0 < kld.js < kld.mean
        def test_plain(kld): assert kld.tv**2 <= kld.mean / 2
        """
    )
    pytester.runpytest(*run).assert_outcomes(passed=2)
    result = pytester.runpytest(*run, "--kld-metrics=all")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["Model*Reverse KLD*JS*TV*Top-5*Flips*"])
    assert passes == [False, True]


def test_the_second_pass_sees_the_logits_that_the_first_sees(
    pytester: pytest.Pytester, reference_dir: Path, candidate_dir: Path, tmp_path: Path
) -> None:
    config = pytester.parseconfig(
        *RUN, f"--kld-ref={reference_dir}", f"--kld-candidate={candidate_dir}", f"--kld-cache-dir={tmp_path}"
    )
    from pytest_kld.settings.config import build_config
    from pytest_kld.settings.subjects import candidates_of, reference_of

    measurement = Measurement(build_config(config), Silent())
    windows = measurement.windows()
    reference = measurement.capture(reference_of(measurement.config), windows)
    candidate = measurement.candidate_capture(candidates_of(measurement.config)[0], windows, reference)
    forth, back = (
        compare(*pair, windows, head="exact", device=torch.device("cpu"), progress=Silent(), extended=True).columns
        for pair in ((reference, candidate), (candidate, reference))
    )
    np.testing.assert_allclose(forth["reverse_kl"], back["kl"], rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(forth["js"], back["js"], rtol=1e-12)
    np.testing.assert_allclose(
        forth["entropy_difference"], back["reference_entropy"] - forth["reference_entropy"], atol=1e-5
    )
