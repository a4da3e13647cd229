"""The extended figures agree with their definitions, evaluated in numpy with long doubles."""

from __future__ import annotations

import math

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pytest_kld.kernel.divergence import divergence
from pytest_kld.kernel.extended import Extended, extended_divergence

Float = NDArray[np.longdouble]
LN2 = math.log(2)


def probabilities(z: NDArray[np.float64]) -> Float:
    weights = np.exp((z - z.max(-1, keepdims=True)).astype(np.longdouble))
    return weights / weights.sum(-1, keepdims=True)


def plogp_over(p: Float, q: Float) -> Float:
    """Σ p ln(p / q) by its definition, 0 ln 0 = 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p == 0, 0, p * np.log(p / q)).sum(-1)


def oracle(z_r: NDArray[np.float64], z_c: NDArray[np.float64]) -> dict[str, Float]:
    p, q = probabilities(z_r), probabilities(z_c)
    middle = (p + q) / 2
    top_r, top_c = ([set(np.argsort(-row, kind="stable")[:5]) for row in z] for z in (z_r, z_c))
    entropy = [np.where(x == 0, 0, -x * np.log(np.where(x == 0, 1, x))).sum(-1) for x in (p, q)]
    return {
        "reverse_kl": plogp_over(q, p),
        "js": (plogp_over(p, middle) + plogp_over(q, middle)) / 2,
        "tv": np.abs(p - q).sum(-1) / 2,
        "top5_overlap": np.array([len(a & b) for a, b in zip(top_r, top_c, strict=True)]) / min(5, z_r.shape[1]),
        "entropy_difference": entropy[1] - entropy[0],
    }


def assert_agrees(figures: Extended, expected: dict[str, Float], *, rtol: float = 1e-9, atol: float = 1e-14) -> None:
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(figures, name).numpy(), values.astype(float), rtol, atol, err_msg=name)


def logits(rows: int, vocab_size: int, seed: int = 0, scale: float = 5.0) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


pairs = st.tuples(st.integers(1, 6), st.integers(2, 40)).flatmap(
    lambda shape: st.tuples(
        *[arrays.arrays(np.float64, shape, elements=st.floats(-60, 60, allow_subnormal=False))] * 2,
    )
)


@given(pairs)
@settings(deadline=None, max_examples=100)
def test_every_figure_agrees_with_its_definition(pair: tuple[NDArray[np.float64], NDArray[np.float64]]) -> None:
    z_r, z_c = pair
    assert_agrees(extended_divergence(torch.from_numpy(z_r), torch.from_numpy(z_c)), oracle(z_r, z_c))


@given(pairs)
@settings(deadline=None, max_examples=100)
def test_bounds_and_symmetries_hold(pair: tuple[NDArray[np.float64], NDArray[np.float64]]) -> None:
    z_r, z_c = map(torch.from_numpy, pair)
    forth, back = extended_divergence(z_r, z_c), extended_divergence(z_c, z_r)
    labels = torch.full((len(z_r),), -1)
    kl = divergence(z_r, z_c, labels).kl
    assert (forth.reverse_kl >= 0).all()
    assert ((forth.js >= 0) & (forth.js <= LN2)).all()
    assert ((forth.tv >= 0) & (forth.tv <= 1)).all()
    assert ((forth.top5_overlap >= 0) & (forth.top5_overlap <= 1)).all()
    torch.testing.assert_close(forth.js, back.js, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(forth.tv, back.tv, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(forth.top5_overlap, back.top5_overlap)
    torch.testing.assert_close(forth.entropy_difference, -back.entropy_difference)
    torch.testing.assert_close(forth.reverse_kl, divergence(z_c, z_r, labels).kl, rtol=1e-9, atol=1e-13)
    pinsker = torch.minimum(kl, forth.reverse_kl) / 2
    assert (forth.tv**2 <= pinsker + 1e-12).all()


@pytest.mark.parametrize("vocab_size", [7, 1000, 50_000])
@pytest.mark.parametrize("noise", [1e-3, 1e-5])
def test_small_figures_have_small_relative_errors(vocab_size: int, noise: float) -> None:
    z = logits(8, vocab_size, scale=1.0)
    d = logits(8, vocab_size, seed=1, scale=noise)
    p = probabilities(z.numpy())
    variance = (p * d.numpy() ** 2).sum(-1) - (p * d.numpy()).sum(-1) ** 2
    figures = extended_divergence(z, z + d)
    # To second order in d, KL = var / 2 both ways and JS = var / 8; the third order is a share of `noise` of it.
    np.testing.assert_allclose(figures.reverse_kl.numpy(), (variance / 2).astype(float), rtol=20 * noise + 1e-5)
    np.testing.assert_allclose(figures.js.numpy(), (variance / 8).astype(float), rtol=20 * noise + 1e-5)
    assert_agrees(figures, oracle(z.numpy(), (z + d).numpy()), rtol=1e-5, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_of_any_dtype_are_taken_for_what_they_are(dtype: torch.dtype) -> None:
    z_r, z_c = logits(5, 3000).to(dtype), logits(5, 3000, seed=1).to(dtype)
    assert_agrees(extended_divergence(z_r, z_c), oracle(z_r.double().numpy(), z_c.double().numpy()))


def test_a_model_beside_itself_differs_in_nothing() -> None:
    z = logits(4, 1000).bfloat16()
    figures = extended_divergence(z, z.clone())
    for name, value in {"reverse_kl": 0, "js": 0, "tv": 0, "top5_overlap": 1, "entropy_difference": 0}.items():
        assert (getattr(figures, name) == value).all(), name


def test_a_constant_shift_changes_nothing() -> None:
    z = logits(4, 1000)
    figures = extended_divergence(z, z + 17.3)
    assert figures.reverse_kl.max() < 1e-15
    assert figures.js.max() < 1e-15
    assert figures.tv.max() < 1e-13


def test_columns_beyond_the_shorter_vocabulary_are_cut_and_the_rest_is_renormalised() -> None:
    z_r, z_c = logits(5, 120), logits(5, 100, seed=1)
    assert_agrees(extended_divergence(z_r, z_c), oracle(z_r[:, :100].numpy(), z_c.numpy()))
    assert_agrees(extended_divergence(z_c, z_r), oracle(z_c.numpy(), z_r[:, :100].numpy()))


def test_minus_infinity_is_a_probability_of_zero() -> None:
    z_r, z_c = logits(3, 50), logits(3, 50, seed=1)
    z_r[0, 3] = z_c[0, 3] = -math.inf  # both rule it out
    z_r[1, 4] = -math.inf  # only the reference does: the reverse divergence is infinite, the others are not
    z_c[2, 5] = -math.inf
    figures = extended_divergence(z_r, z_c)
    assert_agrees(figures, oracle(z_r.numpy(), z_c.numpy()))
    assert figures.reverse_kl.isinf().tolist() == [False, True, False]


def test_opposite_certainties_reach_the_bounds() -> None:
    z_r, z_c = torch.full((1, 20), -math.inf), torch.full((1, 20), -math.inf)
    z_r[0, 0], z_c[0, 19] = 0.0, 0.0
    figures = extended_divergence(z_r, z_c)
    assert figures.js.item() == pytest.approx(LN2, rel=1e-15)
    assert figures.tv.item() == 1
    assert figures.reverse_kl.item() == math.inf
    assert figures.entropy_difference.item() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("column", [0, 7])
def test_a_row_that_is_not_finite_gives_nan_in_every_figure_and_in_no_other_row(
    bad: float, side: int, column: int
) -> None:
    sides = [logits(3, 20), logits(3, 20, seed=1)]
    sides[side][1, column] = bad
    figures = extended_divergence(*sides)
    for name in Extended.__slots__:
        assert getattr(figures, name).isnan().tolist() == [False, True, False], name


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_in_a_further_column_spoils_its_position_alone(bad: float) -> None:
    wide, narrow = logits(3, 30), logits(3, 20, seed=1)
    wide[1, 25] = bad
    for sides in ((wide, narrow), (narrow, wide)):
        figures = extended_divergence(*sides)
        for name in Extended.__slots__:
            assert getattr(figures, name).isnan().tolist() == [False, True, False], name


def test_a_row_that_is_minus_infinity_everywhere_gives_nan() -> None:
    z_r, z_c = logits(2, 20), logits(2, 20, seed=1)
    z_c[0] = -math.inf
    figures = extended_divergence(z_r, z_c)
    for name in Extended.__slots__:
        assert getattr(figures, name).isnan().tolist() == [True, False], name


def test_of_equal_logits_the_first_are_among_the_five() -> None:
    z_r = torch.tensor([[1.0, 3, 3, 3, 3, 3, 3, 9, 0]])  # 7, then 1 2 3 4 of the six equal ones
    z_c = torch.tensor([[9.0, 0, 0, 0, 0, 8, 8, 8, 8]])  # 0, 5, 6, 7, 8
    assert extended_divergence(z_r, z_c).top5_overlap.item() == 1 / 5
    assert extended_divergence(z_r, z_r).top5_overlap.item() == 1


def test_blocks_leave_no_seams() -> None:
    z_r, z_c = logits(40, 20_000).float(), logits(40, 20_000, seed=1).float()
    whole = extended_divergence(z_r, z_c)
    for row in range(40):
        alone = extended_divergence(z_r[row : row + 1], z_c[row : row + 1])
        for name in Extended.__slots__:
            torch.testing.assert_close(getattr(whole, name)[row : row + 1], getattr(alone, name), rtol=1e-13, atol=0)
