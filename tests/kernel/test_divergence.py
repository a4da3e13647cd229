"""The kernel, held against the plain formula in float64."""

from __future__ import annotations

import math
from dataclasses import fields
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import Tensor

from pytest_kld.kernel import reduction as reductions
from pytest_kld.kernel.divergence import (
    CANDIDATE_NON_FINITE,
    NO_LABEL,
    REFERENCE_NON_FINITE,
    Divergence,
    divergence,
)
from pytest_kld.kernel.reduction import Reduced, Reduction, compiled_reduction, eager_reduction

ROWS, VOCAB = 4, 23
INF, NAN = math.inf, math.nan
COMPILED = compiled_reduction()  # one for all tests: it compiles once per width
Matrix = NDArray[np.float64]


def written_reduction(reference: Tensor, candidate: Tensor) -> Reduced:
    """The pass that is compiled, run as it is written: every operation by itself."""
    with mock.patch.object(torch, "compile", lambda function, **_: function):
        return compiled_reduction()(reference, candidate)


every_reduction = pytest.mark.parametrize(
    "reduction", [eager_reduction, COMPILED, written_reduction], ids=["eager", "compiled", "written"]
)


def logits(least: float = -40.0, greatest: float = 40.0) -> st.SearchStrategy[Matrix]:
    numbers = st.floats(least, greatest, allow_subnormal=False, width=32)
    return hnp.arrays(np.float64, (ROWS, VOCAB), elements=numbers)


def log_softmax(z: Matrix) -> Matrix:
    shifted = z - z.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def oracle(reference: Matrix, candidate: Matrix) -> NDArray[np.float64]:
    """Σ p (log p − log q) over the tokens with p > 0."""
    log_p, log_q = log_softmax(reference), log_softmax(candidate)
    possible = log_p > -INF
    difference = np.where(possible, log_p, 0.0) - np.where(possible, log_q, 0.0)
    return np.where(possible, np.exp(log_p) * difference, 0.0).sum(-1)


def assert_close(kl: Tensor, reference: Matrix, candidate: Matrix) -> None:
    """Hold KL against the oracle, as close as float32 arithmetic on logits can come.

    Subtracting the maximum rounds each logit by up to 1e-6, which moves KL by about that times √KL. The formula's two
    terms, of which KL is the difference, are good to a few ε each.
    """
    expected = oracle(reference, candidate)
    finite = expected < INF
    np.testing.assert_array_equal(kl.numpy()[~finite], INF)
    expected, kl_finite = expected[finite], kl.numpy()[finite]
    log_sums = [np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1))[finite] for z in (reference, candidate)]
    log_ratio = log_sums[1] - log_sums[0]
    terms = expected + 2 * (np.expm1(log_ratio) - log_ratio)
    assert (kl_finite >= 0).all()
    tolerance = 1e-6 * terms + 2e-6 * np.sqrt(np.maximum(expected, 0)) + 1e-11
    assert (np.abs(kl_finite - expected) <= tolerance).all(), (kl_finite, expected)


def tensor(z: Matrix, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(z).to(dtype)


def compare(reference: Matrix, candidate: Matrix, reduction: Reduction = eager_reduction) -> Divergence:
    labels = torch.full((len(reference),), -1)
    return divergence(tensor(reference), tensor(candidate), labels, reduction=reduction)


@every_reduction
@settings(max_examples=150, deadline=None)
@given(reference=logits(), candidate=logits())
def test_kl_agrees_with_the_definition_in_float64(reduction: Reduction, reference: Matrix, candidate: Matrix) -> None:
    assert_close(compare(reference, candidate, reduction).kl, reference, candidate)


@every_reduction
@settings(max_examples=60, deadline=None)
@given(reference=logits(), exponent=st.integers(-7, 0), seed=st.integers(0, 2**31))
def test_nearly_equal_sides_keep_their_digits(
    reduction: Reduction, reference: Matrix, exponent: int, seed: int
) -> None:
    noise = np.random.default_rng(seed).normal(size=reference.shape) * 10.0**exponent
    candidate = (reference + noise).astype(np.float32).astype(np.float64)
    assert_close(compare(reference, candidate, reduction).kl, reference, candidate)


def test_smallest_terms_are_not_lost_before_clamping() -> None:
    """`clamp(min=0)` may hide rounding only: without it nothing is below −1e-9."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(64, 5000, generator=generator) * 8
    candidate = reference + torch.randn(64, 5000, generator=generator) * torch.logspace(-8, 0, 64)[:, None]
    s_r, s_c, phi, _ = (value.double() for value in eager_reduction(reference, candidate).sums)
    log_ratio = s_c.log() - s_r.log()
    assert (phi / s_r - (torch.expm1(log_ratio) - log_ratio)).min() >= -1e-9


@every_reduction
@settings(max_examples=60, deadline=None)
@given(z=logits(-(2.0**100), 2.0**100))
def test_equal_sides_give_exactly_zero(reduction: Reduction, z: Matrix) -> None:
    figures = compare(z, z, reduction)
    assert (figures.kl == 0).all()
    assert (figures.flags == NO_LABEL).all()
    assert torch.equal(figures.reference_argmax, figures.candidate_argmax)


@settings(max_examples=100, deadline=None)
@given(reference=logits(), candidate=logits(), shifts=st.tuples(*[st.floats(-100, 100)] * 2))
def test_shifting_a_row_changes_nothing(reference: Matrix, candidate: Matrix, shifts: tuple[float, float]) -> None:
    labels = torch.arange(ROWS)
    plain = divergence(*(torch.from_numpy(z) for z in (reference, candidate)), labels)
    shifted = divergence(
        *(torch.from_numpy(z + s) for z, s in zip((reference, candidate), shifts, strict=True)), labels
    )
    for name in ("kl", "reference_nll", "candidate_nll", "reference_entropy"):
        torch.testing.assert_close(getattr(shifted, name), getattr(plain, name), rtol=1e-9, atol=1e-10)


@settings(max_examples=50, deadline=None)
@given(reference=logits(), candidate=logits())
def test_log_probabilities_do_as_well_as_logits(reference: Matrix, candidate: Matrix) -> None:
    from_logits, from_log_probs = (
        compare(f(reference), f(candidate)).kl.numpy() for f in (lambda z: z, lambda z: log_softmax(z))
    )
    # Each of the two may be 1e-5 from the truth. Log-probabilities are rounded to float32 themselves, by 2e-7 each.
    np.testing.assert_allclose(from_log_probs, from_logits, rtol=2e-5, atol=5e-8)


@pytest.mark.parametrize("elements", [1, VOCAB, 3 * VOCAB, 1 << 20])
def test_rows_do_not_depend_on_the_block_they_are_in(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    reference, candidate = torch.randn(2, 10, VOCAB, generator=generator)
    labels = torch.randint(0, VOCAB, (10,), generator=generator)
    whole = divergence(reference, candidate, labels)
    monkeypatch.setattr(reductions, "_CACHED_ELEMENTS", elements)
    again = divergence(reference, candidate, labels)
    bounds = [0, 1, 4, 4, 10]
    chunks = [divergence(reference[i:j], candidate[i:j], labels[i:j]) for i, j in pairwise(bounds)]
    for field in fields(Divergence):
        assert torch.equal(getattr(whole, field.name), getattr(again, field.name))
        assert torch.equal(getattr(whole, field.name), torch.cat([getattr(chunk, field.name) for chunk in chunks]))


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=lambda dtype: str(dtype)[6:]
)
def test_every_float_dtype_is_compared_as_the_numbers_it_holds(dtype: torch.dtype) -> None:
    reference, candidate = (torch.randn(2, ROWS, VOCAB, generator=torch.Generator().manual_seed(2)) * 5).to(dtype)
    kl = divergence(reference, candidate, torch.arange(ROWS)).kl.numpy()
    expected = oracle(reference.double().numpy(), candidate.double().numpy())
    np.testing.assert_allclose(kl, expected, rtol=1e-12 if dtype == torch.float64 else 2e-6)


def test_sides_may_differ_in_dtype() -> None:
    reference = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(3))
    kl = divergence(reference.bfloat16(), reference.half(), torch.arange(ROWS)).kl.numpy()
    expected = oracle(reference.bfloat16().double().numpy(), reference.half().double().numpy())
    np.testing.assert_allclose(kl, expected, rtol=1e-3, atol=1e-9)


@every_reduction
@settings(max_examples=100, deadline=None)
@given(
    reference=logits(),
    candidate=logits(),
    masks=hnp.arrays(np.bool_, (2, ROWS, VOCAB), elements=st.booleans()),
)
def test_masked_tokens_have_probability_zero(
    reduction: Reduction, reference: Matrix, candidate: Matrix, masks: NDArray[np.bool_]
) -> None:
    masks[:, :, 0] = False  # something is possible
    reference, candidate = (np.where(m, -INF, z) for m, z in zip(masks, (reference, candidate), strict=True))
    figures = compare(reference, candidate, reduction)
    assert_close(figures.kl, reference, candidate)
    assert (figures.flags == NO_LABEL).all()
    assert figures.reference_entropy.isfinite().all()


@every_reduction
def test_a_token_impossible_for_the_candidate_alone_makes_kl_infinite(reduction: Reduction) -> None:
    reference, candidate = np.zeros((ROWS, VOCAB)), np.zeros((ROWS, VOCAB))
    candidate[0, 5] = -INF
    reference[1, 5] = -INF
    reference[2, 5] = candidate[2, 5] = -INF
    kl = compare(reference, candidate, reduction).kl.tolist()
    assert kl == [INF, pytest.approx(math.log(VOCAB / (VOCAB - 1))), 0, 0]


@every_reduction
def test_what_float32_deems_impossible_may_be_masked(reduction: Reduction) -> None:
    """A reference probability below e⁻¹⁰³ is 0 in float32, and float64 sees it."""
    reference, candidate = np.zeros((ROWS, VOCAB)), np.zeros((ROWS, VOCAB))
    reference[:, 5], candidate[:, 5] = -200.0, -INF
    assert (compare(reference, candidate, reduction).kl == 0).all()
    labels = torch.full((ROWS,), -1)
    in_float64 = divergence(torch.from_numpy(reference), torch.from_numpy(candidate), labels, reduction=reduction)
    assert (in_float64.kl == INF).all()


@every_reduction
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("column", [0, 7, VOCAB - 1])
def test_non_finite_rows_are_flagged_apart_and_never_raise(reduction: Reduction, bad: float, column: int) -> None:
    reference, candidate = np.random.default_rng(4).normal(size=(2, ROWS, VOCAB))
    reference[1, column] = candidate[2, column] = reference[3, column] = candidate[3, column] = bad
    figures = divergence(tensor(reference), tensor(candidate), torch.tensor([0, 1, 2, -1]), reduction=reduction)
    both = REFERENCE_NON_FINITE | CANDIDATE_NON_FINITE
    assert figures.flags.tolist() == [0, REFERENCE_NON_FINITE, CANDIDATE_NON_FINITE, both | NO_LABEL]
    assert figures.kl.isnan().tolist() == [False, True, True, True]
    assert figures.reference_nll.isnan().tolist() == [False, True, False, True]
    assert figures.candidate_nll.isnan().tolist() == [False, False, True, True]
    assert figures.reference_entropy.isnan().tolist() == [False, True, False, True]
    np.testing.assert_allclose(figures.kl[0], oracle(reference[:1], candidate[:1])[0], rtol=2e-6)


@every_reduction
def test_a_row_without_any_possible_token_is_not_finite(reduction: Reduction) -> None:
    reference = np.zeros((ROWS, VOCAB))
    candidate = reference.copy()
    candidate[0] = -INF
    figures = compare(reference, candidate, reduction)
    assert figures.flags.tolist() == [CANDIDATE_NON_FINITE | NO_LABEL, *[NO_LABEL] * 3]
    assert figures.kl.isnan().tolist() == [True, False, False, False]


@every_reduction
@settings(max_examples=100, deadline=None)
@given(
    values=hnp.arrays(
        np.float32, (2, ROWS, VOCAB), elements=st.sampled_from([NAN, INF, -INF, 3.4e38, -3.4e38, 1e-45, 0.0, 1.0])
    )
)
def test_no_input_raises_and_what_is_not_flagged_is_a_number(reduction: Reduction, values: NDArray[np.float32]) -> None:
    figures = divergence(*torch.from_numpy(values), torch.full((ROWS,), -1), reduction=reduction)
    for row, (reference, candidate) in enumerate(zip(*values, strict=True)):
        expected = NO_LABEL
        for side, bit in ((reference, REFERENCE_NON_FINITE), (candidate, CANDIDATE_NON_FINITE)):
            if np.isnan(side).any() or (side == INF).any() or (side == -INF).all():
                expected |= bit
        assert figures.flags[row] == expected
        assert bool(figures.kl[row].isnan()) == (expected != NO_LABEL)


@every_reduction
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e3, 1e6, 1e30])
def test_tiny_and_huge_logits_agree_with_float64(reduction: Reduction, scale: float) -> None:
    z = np.random.default_rng(5).normal(size=(2, ROWS, VOCAB)).astype(np.float32) * np.float32(scale)
    reference, candidate = z.astype(np.float64)
    kl = compare(reference, candidate, reduction).kl.numpy()
    np.testing.assert_allclose(kl, oracle(reference, candidate), rtol=2e-6, atol=1e-12)


def test_the_longer_vocabulary_is_cut_and_renormalised() -> None:
    wide, narrow = (np.random.default_rng(6).normal(size=(ROWS, n)) * 3 for n in (VOCAB + 9, VOCAB))
    wide[:, VOCAB:] = 30  # would take all the mass
    for reference, candidate in ((wide, narrow), (narrow, wide)):
        figures = compare(reference, candidate)
        cut = oracle(reference[:, :VOCAB], candidate[:, :VOCAB])
        np.testing.assert_allclose(figures.kl.numpy(), cut, rtol=1e-5)
        assert max(figures.reference_argmax.max(), figures.candidate_argmax.max()) < VOCAB


def wide_and_narrow(least: float = -40.0) -> st.SearchStrategy[tuple[Matrix, Matrix]]:
    numbers = st.floats(least, 40, allow_subnormal=False, width=32) | st.just(-INF)
    return st.integers(1, 9).flatmap(
        lambda more: st.tuples(
            logits(), hnp.arrays(np.float64, (ROWS, more), elements=numbers), logits().map(lambda z: z.copy())
        ).map(lambda parts: (np.concatenate(parts[:2], 1), parts[2]))
    )


@every_reduction
@settings(max_examples=100, deadline=None)
@given(sides=wide_and_narrow())
def test_mass_outside_the_common_vocabulary_agrees_with_float64(
    reduction: Reduction, sides: tuple[Matrix, Matrix]
) -> None:
    wide, narrow = sides
    expected = np.exp(log_softmax(wide))[:, VOCAB:].sum(-1)
    as_reference, as_candidate = compare(wide, narrow, reduction), compare(narrow, wide, reduction)
    for mass in (as_reference.reference_cut_mass, as_candidate.candidate_cut_mass):
        np.testing.assert_allclose(mass.numpy(), expected, rtol=1e-5, atol=1e-300)
    assert (as_reference.candidate_cut_mass == 0).all()
    assert (as_candidate.reference_cut_mass == 0).all()
    # The KL to the candidate's whole distribution is what is left of it, and what was cut.
    possible = expected < 1 - 1e-9
    padded = np.concatenate([narrow, np.full((ROWS, wide.shape[1] - VOCAB), -INF)], 1)
    np.testing.assert_allclose(
        (as_candidate.kl.numpy() - np.log1p(-expected, where=possible, out=np.zeros(ROWS)))[possible],
        oracle(padded, wide)[possible],
        rtol=1e-4,
        atol=1e-4,
    )


@every_reduction
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("column", [VOCAB, VOCAB + 8])
def test_what_is_not_finite_in_a_further_column_spoils_its_position_alone(
    reduction: Reduction, bad: float, column: int
) -> None:
    wide, narrow = (np.random.default_rng(6).normal(size=(ROWS, n)) for n in (VOCAB + 9, VOCAB))
    wide[1, column] = bad
    as_reference, as_candidate = compare(wide, narrow, reduction), compare(narrow, wide, reduction)
    for figures, flag in ((as_reference, REFERENCE_NON_FINITE), (as_candidate, CANDIDATE_NON_FINITE)):
        assert ((figures.flags & flag) != 0).tolist() == [False, True, False, False]
        assert ((figures.flags & ~flag) == NO_LABEL).all()
        assert figures.kl.isnan().tolist() == [False, True, False, False]
    assert as_candidate.candidate_cut_mass.isnan().tolist() == [False, True, False, False]


def test_sides_of_equal_width_cost_no_further_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Tensor:
        raise AssertionError("a pass over columns that are not there")

    monkeypatch.setattr("torch.Tensor.logsumexp", fail)
    z = np.random.default_rng(6).normal(size=(2, ROWS, VOCAB))
    figures = compare(*z)
    assert (figures.reference_cut_mass == 0).all()
    assert (figures.candidate_cut_mass == 0).all()


def test_labels_entropy_and_argmax_agree_with_float64() -> None:
    reference, candidate = np.random.default_rng(7).normal(size=(2, ROWS, VOCAB)) * 4
    labels = [0, VOCAB - 1, -1, 11]
    figures = divergence(tensor(reference), tensor(candidate), torch.tensor(labels))
    log_p, log_q = log_softmax(reference), log_softmax(candidate)
    for row, label in enumerate(labels):
        nlls = figures.reference_nll[row].item(), figures.candidate_nll[row].item()
        assert nlls == pytest.approx((NAN, NAN) if label < 0 else (-log_p[row, label], -log_q[row, label]), nan_ok=True)
    assert figures.flags.tolist() == [0, 0, NO_LABEL, 0]
    np.testing.assert_allclose(figures.reference_entropy, -(np.exp(log_p) * log_p).sum(-1), rtol=1e-6)
    np.testing.assert_array_equal(figures.reference_argmax, reference.argmax(-1))
    np.testing.assert_array_equal(figures.candidate_argmax, candidate.argmax(-1))
    assert figures.reference_argmax.dtype == figures.candidate_argmax.dtype == torch.int32  # four bytes in each table


def test_argmax_is_the_first_among_equals() -> None:
    reference, candidate = np.zeros((1, VOCAB)), np.zeros((1, VOCAB))
    reference[0, [4, 9]] = candidate[0, [9, 12]] = 1
    figures = compare(reference, candidate)
    assert (figures.reference_argmax.item(), figures.candidate_argmax.item()) == (4, 9)


def test_an_impossible_label_has_infinite_nll() -> None:
    reference, candidate = np.zeros((1, VOCAB)), np.zeros((1, VOCAB))
    candidate[0, 3] = -INF
    figures = divergence(tensor(reference), tensor(candidate), torch.tensor([3]))
    assert figures.candidate_nll.item() == INF
    assert figures.reference_nll.item() == pytest.approx(math.log(VOCAB))


@every_reduction
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_any_number_of_rows_will_do(reduction: Reduction, rows: int) -> None:
    reference, candidate = np.random.default_rng(9).normal(size=(2, rows, VOCAB))
    figures = compare(reference, candidate, reduction)
    assert all(getattr(figures, field.name).shape == (rows,) for field in fields(figures))
    np.testing.assert_allclose(figures.kl, oracle(reference, candidate), rtol=2e-6)


@every_reduction
def test_a_large_vocabulary_agrees_with_float64(reduction: Reduction) -> None:
    generator = torch.Generator().manual_seed(8)
    reference = torch.randn(ROWS, 100_003, generator=generator) * 4
    candidate = reference + torch.randn(ROWS, 100_003, generator=generator) * torch.logspace(-4, 0, ROWS)[:, None]
    kl = divergence(reference, candidate, torch.arange(ROWS), reduction=reduction).kl
    assert_close(kl, reference.double().numpy(), candidate.double().numpy())


@pytest.mark.filterwarnings("default")  # torch's compiler imports deprecated parts of torch
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", [COMPILED, written_reduction], ids=["compiled", "written"])
def test_one_pass_agrees_with_float64_over_whole_tiles_and_a_tail(reduction: Reduction, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    reference = (torch.randn(6, 4099, generator=generator) * 3).to(dtype)
    candidate = reference + (torch.randn(6, 4099, generator=generator) * 1e-3).to(dtype)
    candidate[1] = torch.randn(4099, generator=generator) * 30  # far apart: most weights underflow
    reference[2, 5], candidate[2, 5] = -torch.inf, -torch.inf  # impossible on both sides
    reference[3, 5] = -torch.inf  # on the reference's alone
    candidate[4, 5] = -torch.inf  # on the candidate's alone
    candidate[5] = reference[5]
    p, q = reference.double().log_softmax(-1), candidate.double().log_softmax(-1)
    expected = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1)
    figures = divergence(reference, candidate, torch.full((6,), -1), reduction=reduction)
    assert figures.kl[4] == torch.inf
    assert figures.kl[5] == 0
    # Log ratios of 1e-3 are differences of float32 logits of size 10, which are 1e-6 apart.
    torch.testing.assert_close(figures.kl, expected.clamp(min=0), rtol=5e-4, atol=1e-12)


@pytest.mark.filterwarnings("default")
@every_reduction
def test_arg_max_is_the_first_of_equals_across_tiles_and_in_the_tail(reduction: Reduction) -> None:
    logits = torch.zeros(4, 4099)
    logits[1, [2047, 2048]] = 1
    logits[2, [4097, 4098]] = 1
    logits[3, 3000] = torch.nan
    figures = divergence(logits, logits, torch.full((4,), -1), reduction=reduction)
    assert figures.reference_argmax[:3].tolist() == [0, 2047, 4097]
    assert figures.flags.tolist() == [4, 4, 4, 7]


def test_the_exponential_of_the_one_pass_is_exact_to_float32() -> None:
    v = torch.linspace(-100, 80, 100_003)
    k, t, phi = (part.double() for part in reductions._split_exp(v))
    assert k.equal(k.round())
    assert t.abs().max() < math.log(2) / 2 + 1e-5
    torch.testing.assert_close(k * math.log(2) + t, v.double(), rtol=1e-7, atol=1e-7)
    sure = t.abs() > 1e-3  # nearer to 0 the difference below has few digits even in float64
    torch.testing.assert_close(phi[sure], (t.expm1() - t)[sure], rtol=3e-7, atol=0)
