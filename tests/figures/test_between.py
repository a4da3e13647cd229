"""Two candidates beside each other, against float64 arithmetic on transformers' own logits."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from recorded import load, own_logits, record

from pytest_kld.errors import ScoresError
from pytest_kld.figures.between import Between, between
from pytest_kld.figures.compare import compare
from pytest_kld.figures.scores import Scores
from pytest_kld.progress import Silent

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_kld.captures.capture import Capture
    from pytest_kld.text.windows import Windows


def kl(z_p: torch.Tensor, z_q: torch.Tensor) -> np.ndarray:
    """KL(p ‖ q) at each position from logits, in float64."""
    log_p, log_q = z_p.double().log_softmax(-1), z_q.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).numpy()


def scores_of(one: Capture, other: Capture, windows: Windows, *, extended: bool = False) -> Scores:
    cpu = torch.device("cpu")
    return compare(one, other, windows, head="native", device=cpu, progress=Silent(), extended=extended)


@pytest.fixture
def captures(reference_dir: Path, candidate_dir: Path, windows: Windows, tmp_path: Path) -> list[Capture]:
    """The reference, and one candidate in two dtypes."""
    return [
        record(reference_dir, windows, tmp_path),
        record(candidate_dir, windows, tmp_path),
        record(candidate_dir, windows, tmp_path, dtype="bfloat16"),
    ]


@pytest.fixture
def tables(captures: list[Capture], windows: Windows) -> tuple[Scores, Scores, Scores]:
    reference, first, second = captures
    return (
        scores_of(first, second, windows, extended=True),
        scores_of(reference, first, windows),
        scores_of(reference, second, windows),
    )


def figures_of(tables: tuple[Scores, Scores, Scores], confidence: float | None = None) -> Between:
    return between(*tables, confidence=confidence, of_difference=0.95)


def test_both_directions_are_those_of_the_models_own_logits(
    tables: tuple[Scores, Scores, Scores],
    reference_dir: Path,
    candidate_dir: Path,
    windows: Windows,
) -> None:
    found = figures_of(tables)
    z_r, z_1 = (own_logits(load(model), windows) for model in (reference_dir, candidate_dir))
    z_2 = own_logits(load(candidate_dir, "bfloat16"), windows)
    for direction, expected in ((found.forth, kl(z_1, z_2)), (found.back, kl(z_2, z_1))):
        assert direction.mean == pytest.approx(expected.mean(), rel=1e-3)
        assert direction.p99 == pytest.approx(np.quantile(expected, 0.99), rel=1e-2)
        assert direction.max == pytest.approx(expected.max(), rel=1e-2)
        assert direction.interval is None
    assert found.forth.mean != found.back.mean
    assert found.disagreement == pytest.approx((z_1.argmax(-1) != z_2.argmax(-1)).double().mean().item(), abs=0.01)
    difference = (kl(z_r, z_1) - kl(z_r, z_2)).mean()
    assert found.difference == pytest.approx(difference, rel=1e-2)
    assert found.difference_interval.low <= found.difference <= found.difference_interval.high
    assert (found.positions, found.not_finite) == (windows.token_ids.size, 0)


def test_the_other_order_exchanges_the_directions_and_the_sign(
    captures: list[Capture], tables: tuple[Scores, Scores, Scores], windows: Windows
) -> None:
    found = figures_of(tables, 0.9)
    turned = figures_of((scores_of(captures[2], captures[1], windows, extended=True), tables[2], tables[1]), 0.9)
    assert turned.forth.mean == pytest.approx(found.back.mean, rel=1e-3)
    assert turned.back.mean == pytest.approx(found.forth.mean, rel=1e-3)
    assert turned.difference == -found.difference
    assert turned.difference_interval.low == pytest.approx(-found.difference_interval.high)
    assert turned.disagreement == found.disagreement
    for direction in (found.forth, found.back):
        assert direction.interval is not None
        assert direction.interval.low <= direction.mean <= direction.interval.high


def test_a_candidate_does_not_differ_from_itself(captures: list[Capture], windows: Windows) -> None:
    reference, first, _ = captures
    alone = scores_of(reference, first, windows)
    found = figures_of((scores_of(first, first, windows, extended=True), alone, alone))
    assert (found.forth.max, found.back.max, found.disagreement, found.difference) == (0, 0, 0, 0)


def test_positions_that_are_not_finite_are_counted_and_left_out(tables: tuple[Scores, Scores, Scores]) -> None:
    pair, first, second = tables
    flags = pair.columns["flags"].copy()
    flags[0, 3] |= 2
    columns = {**pair.columns, "flags": flags, "kl": pair.columns["kl"].copy()}
    columns["kl"][0, 3] = np.nan
    found = figures_of((replace(pair, columns=columns), first, second))
    assert (found.positions, found.not_finite) == (flags.size - 1, 1)
    kept = np.delete(pair.columns["kl"].ravel(), 3)
    assert found.forth.mean == pytest.approx(kept.mean())


def test_the_difference_leaves_out_what_is_not_finite_on_either_side(tables: tuple[Scores, Scores, Scores]) -> None:
    pair, first, second = tables
    flags, kl_of_second = second.columns["flags"].copy(), second.columns["kl"].copy()
    flags[0, 3] |= 2
    kl_of_second[0, 3] = np.nan
    found = figures_of((pair, first, replace(second, columns={**second.columns, "flags": flags, "kl": kl_of_second})))
    differences = np.delete((first.columns["kl"] - second.columns["kl"]).ravel(), 3)
    assert found.difference == pytest.approx(differences.mean())


def test_several_datasets_weigh_the_same_and_each_has_its_own_directions(
    tables: tuple[Scores, Scores, Scores],
) -> None:
    count = len(tables[0].columns["flags"])
    parts = [
        {"dataset": "short", "text_sha256": "0", "windows": 1},
        {"dataset": "long", "text_sha256": "1", "windows": count - 1},
    ]
    split = tuple(
        replace(one, about={**one.about, "protocol": {**one.about["protocol"], "datasets": parts}}, evidence={})
        for one in tables
    )
    found = figures_of(split)  # type: ignore[arg-type]
    values = tables[0].columns["kl"]
    assert found.datasets["short"][0].mean == pytest.approx(values[0].mean())
    assert found.datasets["long"][1].mean == pytest.approx(tables[0].columns["reverse_kl"][1:].mean())
    assert found.forth.mean == pytest.approx((values[0].mean() + values[1:].mean()) / 2)


def test_tables_of_other_tokens_are_refused(tables: tuple[Scores, Scores, Scores]) -> None:
    pair, first, second = tables
    other = replace(pair, columns={**pair.columns, "token_ids": pair.columns["token_ids"] + 1})
    with pytest.raises(ScoresError, match="on other tokens"):
        figures_of((other, first, second))
