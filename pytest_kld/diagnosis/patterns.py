"""Patterns: how known faults appear in the figures, with a detector for each.

A detector returns the figures by which it recognised the fault, or None. Thresholds are far from the figures of healthy
quantized models; if a number is a matter of judgement, a comment says what it was compared with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_kld.figures.positions import Booleans, Floats, Integers, Positions
    from pytest_kld.text.tokens import Tokens


class Pattern(TypedDict):
    """A fault that the data show.

    `name` is one of `PATTERNS`; `explanation` says what it usually means and what to check; `evidence` gives the
    figures by which it was recognised.
    """

    name: str
    explanation: str
    evidence: str


PATTERNS = {
    "identical": "Both sides are the same to the last bit. Was the candidate quantized at all? Was the reference named "
    "twice?",
    "implausible": "At most positions the candidate's first choice is a different token. Quantization alone does not "
    "cause that: the weights, the head, the tokenizer or the text is wrong.",
    "nan-onward": "From one position on, nothing in a window is finite. Attention passes a NaN on to all later "
    "positions, so check the first one: its token's embedding, its position, an overflow in 16 bits.",
    "broken-stretch": "Every window that covers a certain stretch of the text is wrong there and right elsewhere. The "
    "cause is in the text: rare tokens with broken embeddings, or a script or format that calibration never saw.",
    "shifted-tokens": "The logits of some tokens are off by the same amount at every position. Their rows of the head "
    "or its bias differ, for example for added tokens that conversion or calibration omitted.",
    "off-by-one": "The candidate's answers belong to a neighbouring position. Rows or token ids are shifted by one on "
    "one side: a doubled or missing first token, or a capture from another server.",
    "permuted-vocabulary": "The candidate makes consistent predictions under different ids. The rows of its head are "
    "in a different order, or its tokenizer numbers tokens differently.",
    "wrong-scale": "The candidate's distribution is the reference's at another temperature. A scale on the logits is "
    "missing or doubled: a logit scale, a soft cap, a norm before the head, a scale of the head's weights.",
    "decode-departs": "Decoding gives other distributions than a prefill of the same tokens, beyond what the engine "
    "does for the reference. The cause is in what only decoding runs: the KV cache's format or scales, the attention "
    "of one token at a time, a kernel for few rows. If it begins at a position, suspect a tile or a block size.",
    "uniform-noise": "The loss is spread evenly over the text and over the window: nothing in particular is broken, "
    "the whole model is too coarse. A finer format, smaller groups, or calibration would help.",
}
"""The patterns by name, with what each usually means."""

_SUFFICIENT = 16
"""With fewer positions than this, no share of them counts as a regularity."""
_STRETCH = 16
"""Tokens in a stretch of source text; with this many, single hard tokens do not determine its median."""


def find_patterns(positions: Positions, tokens: Tokens | None) -> list[Pattern]:
    """Name the faults that the data show. Uniform noise is named only if no other pattern is found."""
    found = {name: detect(positions, tokens) for name, detect in _DETECTORS.items()}
    if not any(found.values()):
        found["uniform-noise"] = _uniform_noise(positions)
    return [
        Pattern(name=name, explanation=PATTERNS[name], evidence=evidence)
        for name, evidence in found.items()
        if evidence is not None
    ]


def _identical(positions: Positions, _: Tokens | None) -> str | None:
    if positions.kl[positions.valid].any():
        return None
    return f"KL is exactly 0 at each of {int(positions.valid.sum()):,} positions"


def _implausible(positions: Positions, _: Tokens | None) -> str | None:
    agreement = positions.top1_agreement
    # Published 2-bit quantizations keep more than 70 %; half is far below everything in use.
    return f"top-1 agreement is {agreement:.1%}" if agreement < 0.5 else None


def _nan_onward(positions: Positions, tokens: Tokens | None) -> str | None:
    sides = (("candidate", positions.candidate_bad), ("reference", positions.reference_bad))
    found = (_onward(side, bad, positions, tokens) for side, bad in sides)
    return "; ".join(evidence for evidence in found if evidence) or None


def _onward(side: str, bad: Booleans, positions: Positions, tokens: Tokens | None) -> str | None:
    windows = np.flatnonzero(bad.any(1))
    first = bad[windows].argmax(1)
    onward = bad[windows].sum(1) == bad.shape[1] - first  # positions before the first are finite by definition
    if not windows.size or not onward.all():
        return None
    evidence = f"the {side} is not finite in {windows.size:,} of {len(bad):,} windows, from one position to the end"
    at = positions.token_ids[windows, first]
    if windows.size > 1 and (first == first[0]).all():
        return f"{evidence}, each from position {first[0] + positions.first:,}"
    if windows.size > 1 and (at == at[0]).all() and first.any():
        return f"{evidence}, each from token id {at[0]:,}{_quoted(tokens, int(at[0]))}"
    return f"{evidence}, the first (window {windows[0]:,}) from position {first[0] + positions.first:,}"


def _broken_stretch(positions: Positions, _: Tokens | None) -> str | None:
    """Compare the medians of stretches of the text; for each stretch, the window with the lowest median counts.

    Single hard tokens do not determine a median. Text differs in difficulty, so a stretch is compared with the hardest
    tenth of the text, not with the middle: it must be ten times worse.
    """
    stretches = _medians_of_stretches(positions)
    covered = {place: medians for place, medians in stretches.items() if len(medians) > 1}
    if len(covered) < _SUFFICIENT:
        return None
    usual = sorted(map(min, covered.values()))[len(covered) * 9 // 10]
    broken = sorted(place for place, medians in covered.items() if min(medians) > 10 * usual and min(medians) > 0.01)
    if not broken:
        return None
    runs: list[list[tuple[int, int]]] = []
    for place in broken:
        if runs and runs[-1][-1] == (place[0], place[1] - 1):
            runs[-1].append(place)
        else:
            runs.append([place])
    text, start = max(runs, key=len)[0]
    stop = start + max(map(len, runs))
    median = float(np.median([kl for place in max(runs, key=len) for kl in covered[place]]))
    others = f" (and {len(runs) - 1:,} shorter)" if len(runs) > 1 else ""
    of_text = f" of text {text}" if positions.text.max() else ""
    return (
        f"tokens {start * _STRETCH:,} to {stop * _STRETCH:,}{of_text}{others}: median KL {median:.4g} nats in each "
        f"window that covers them, and below {usual:.4g} in nine tenths of the text"
    )


def _medians_of_stretches(positions: Positions) -> dict[tuple[int, int], list[float]]:
    """Return, by text and number of the stretch, its median KL in each window that covers it completely."""
    medians: dict[tuple[int, int], list[float]] = {}
    size = positions.shape[1]
    for window, text in enumerate(positions.text.tolist()):
        source = int(positions.source[window, 0])
        skip = -source % _STRETCH
        count = (size - skip) // _STRETCH
        if count < 1:
            continue
        rows = positions.kl[window, skip : skip + count * _STRETCH].reshape(count, _STRETCH)
        for number, row in enumerate(rows, (source + skip) // _STRETCH):
            if not np.isnan(row).any():
                medians.setdefault((text, number), []).append(float(np.median(row)))
    return medians


def _shifted_tokens(positions: Positions, tokens: Tokens | None) -> str | None:
    """Find tokens whose logits are off by a constant.

    A token counts as shifted if its logit is off by more than half a nat (a factor of 1.6 in the odds), by more than
    eight times the typical shift over the vocabulary, and by more than three times its own deviation over positions.
    """
    evidence = positions.evidence
    if "shift" not in evidence or len(evidence["sampled"]) < _SUFFICIENT:
        return None
    shift, size = evidence["shift"], np.abs(evidence["shift"])
    shifted = (size > 0.5) & (size > 8 * evidence["shift_scale"][0]) & (size > 3 * evidence["shift_deviation"])
    if not shifted.any():
        return None
    ids = evidence["vocabulary_ids"][shifted]
    strongest = np.argsort(-size[shifted])[:3]
    named = ", ".join(
        f"{ids[index]:,}{_quoted(tokens, int(ids[index]))} by {shift[shifted][index]:+.2f}" for index in strongest
    )
    special = "" if tokens is None else f", {sum(int(one) in tokens.special_ids for one in ids)} of them special"
    return f"{ids.size:,} tokens are off by a constant{special}; id {named} nats"


def _off_by_one(positions: Positions, _: Tokens | None) -> str | None:
    """Compare the candidate's choices with the reference's at the neighbouring positions."""
    reference, candidate, valid = positions.reference_argmax, positions.candidate_argmax, positions.valid
    both = valid[:, 1:] & valid[:, :-1]
    if both.sum() < _SUFFICIENT:
        return None
    before = float((candidate[:, 1:] == reference[:, :-1])[both].mean())
    after = float((candidate[:, :-1] == reference[:, 1:])[both].mean())
    match, side = max((before, "before"), (after, "after"))
    # Repetitive text also agrees with neighbouring positions, but not more than with the same position.
    if match < 0.5 or match < positions.top1_agreement + 0.2:
        return None
    return (
        f"the candidate's first choice is the reference's at the position {side} in {match:.1%} of cases, and at the "
        f"same position in {positions.top1_agreement:.1%}"
    )


def _permuted_vocabulary(positions: Positions, tokens: Tokens | None) -> str | None:
    """Find tokens that the candidate consistently calls by another id.

    A token counts as renamed if the candidate mostly chooses one other token in its place, and that other token mostly
    appears in its place, at five positions or more. Quantization errors, in contrast, lead to common tokens, which
    replace many different tokens.
    """
    reference, candidate = positions.reference_argmax[positions.valid], positions.candidate_argmax[positions.valid]
    keys, counts = np.unique(reference << 32 | candidate, return_counts=True)
    pairs = keys >> 32, keys & 0xFFFFFFFF
    of_reference, of_candidate = _total_per(pairs[0], counts), _total_per(pairs[1], counts)
    renamed = (pairs[0] != pairs[1]) & (counts >= 5) & (counts > 0.6 * of_reference) & (counts > 0.6 * of_candidate)
    share = float(counts[renamed].sum() / counts.sum())
    if renamed.sum() < 2 or share < 0.02:
        return None
    evidence = f"{int(renamed.sum()):,} tokens, {share:.1%} of the positions, have another id"
    offsets, times = np.unique(pairs[1][renamed] - pairs[0][renamed], return_counts=True)
    if times.max() > 0.9 * times.sum():  # in a rolled vocabulary the last ids become the first
        offset = int(offsets[times.argmax()])
        return f"{evidence}, {abs(offset):,} {'higher' if offset > 0 else 'lower'}"
    example = np.flatnonzero(renamed)[counts[renamed].argmax()]
    one, other = (int(side[example]) for side in pairs)
    return f"{evidence}, such as {one:,}{_quoted(tokens, one)}, which is {other:,}{_quoted(tokens, other)}"


def _total_per(ids: Integers, counts: Integers) -> Integers:
    _, which = np.unique(ids, return_inverse=True)
    totals = np.bincount(which, counts).astype(np.int64)
    return totals[which]


def _wrong_scale(positions: Positions, _: Tokens | None) -> str | None:
    """Correct sampled rows by their best temperature: if most of the KL disappears, the scale is wrong.

    With noise, the slope is near 1 and the KL remains.
    """
    evidence = positions.evidence
    if "slope" not in evidence or len(evidence["slope"]) < _SUFFICIENT:
        return None
    slopes, kl, left = evidence["slope"], float(evidence["kl"].mean()), float(evidence["tempered_kl"].mean())
    slope = float(np.median(slopes))
    if abs(slope - 1) < 0.05 or slope <= 0 or left > 0.25 * kl:
        return None
    return (
        f"the candidate's logits are {slope:.3g} times the reference's; undoing that takes the mean KL from "
        f"{kl:.4g} to {left:.4g} nats"
    )


def _decode_departs(positions: Positions, _: Tokens | None) -> str | None:
    """Compare the gap at each position of the window, its median over the windows, with the reference's.

    A position departs if its gap is above ten times the reference's own, the median over all positions, which shows
    what rounding adds (about 1e-3 nats in bfloat16, 1e-11 in float32, on SmolLM2), and above 1e-4 nats, below which a
    gap does not matter.
    """
    if positions.gap is None or positions.reference_gap is None or positions.gap.shape[1] < _SUFFICIENT:
        return None
    known = np.flatnonzero(~np.isnan(positions.gap).all(0))
    gap = np.full(positions.gap.shape[1], np.nan)
    gap[known] = np.nanmedian(positions.gap[:, known], 0)
    floor = 0.0 if np.isnan(positions.reference_gap).all() else float(np.nanmedian(positions.reference_gap))
    departs = gap > max(1e-4, 10 * floor)
    share = float(departs[known].mean()) if known.size else 0.0
    if share < 0.1 and departs.sum() < _SUFFICIENT:
        return None
    # The split after which most positions depart and before which few do.
    before = np.concatenate([[0], np.cumsum(departs)])
    right = before[-1] - before + np.arange(len(before)) - before  # departing after the split, others before it
    split = int(right.argmax())
    after, earlier = departs[split:].sum(), departs[:split].sum()
    sizes = f"median {np.nanmedian(gap[departs]):.3g} nats, the reference's own {floor:.3g}"
    if split == 0 or after < 0.8 * (len(departs) - split) or earlier > 0.2 * split:
        return f"decode departs from prefill at {share:.0%} of the positions: {sizes}"
    return f"decode departs from prefill from position {positions.first + split:,} on: {sizes}"


def _uniform_noise(positions: Positions) -> str | None:
    """Recognise loss that is equally large everywhere.

    The mean KL is at least in the band `noticeable` (0.05 nats); half of the positions have at least a third of the
    mean; the worst hundredth carries at most a tenth of the total; and no window or part of one exceeds twice the mean.
    """
    mean = positions.mean_kl
    kl = positions.kl[positions.valid]
    if not 0.05 <= mean < np.inf or np.median(kl) < mean / 3 or positions.top_share(0.01) > 0.1:
        return None
    parts = [*np.array_split(np.arange(positions.shape[1]), 8)]
    by_position = [_mean_where(positions.kl[:, part], positions.valid[:, part]) for part in parts]
    by_window = [_mean_where(row, valid) for row, valid in zip(positions.kl, positions.valid, strict=True)]
    greatest = max(*by_position, *by_window)
    if greatest > 2 * mean:
        return None
    return (
        f"the median KL is {np.median(kl) / mean:.0%} of the mean, the worst 1 % of the positions carry "
        f"{positions.top_share(0.01):.1%}, and no window or part of one is above {greatest / mean:.2g} times the mean"
    )


def _mean_where(kl: Floats, valid: Booleans) -> float:
    return float(kl[valid].mean()) if valid.any() else 0.0


def _quoted(tokens: Tokens | None, token_id: int) -> str:
    return "" if tokens is None else f" ({tokens.text(token_id)!r})"


_DETECTORS: dict[str, Callable[[Positions, Tokens | None], str | None]] = {
    "identical": _identical,
    "implausible": _implausible,
    "nan-onward": _nan_onward,
    "broken-stretch": _broken_stretch,
    "shifted-tokens": _shifted_tokens,
    "off-by-one": _off_by_one,
    "permuted-vocabulary": _permuted_vocabulary,
    "wrong-scale": _wrong_scale,
    "decode-departs": _decode_departs,
}
