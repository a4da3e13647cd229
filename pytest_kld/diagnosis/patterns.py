"""Patterns: what a known fault looks like in the figures, with a detector for each.

A detector answers with the figures it recognised the fault by, or with None. Thresholds are wide of what healthy
quantized models show; where a number is one of judgement, the comment beside it says what it was held against.
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

    `name` is one of `PATTERNS`, `explanation` what it usually means and what to look at, `evidence` the figures that
    it was recognised by.
    """

    name: str
    explanation: str
    evidence: str


PATTERNS = {
    "identical": "Both sides are the same to the last bit. Was the candidate quantized at all, or the reference named "
    "twice?",
    "implausible": "More often than not the candidate's first choice is another token. Quantization alone does not do "
    "that: the weights, the head, the tokenizer or the text is the wrong one.",
    "nan-onward": "From one position on, nothing in a window is finite. Attention carries a NaN on to all that "
    "follows, so look at what stands at the first one: its token's embedding, its position, an overflow in 16 bits.",
    "broken-stretch": "Every window that covers a stretch of the text is wrong there and right elsewhere. The cause is "
    "in what the text says: rare tokens with broken embeddings, a script or format that calibration never saw.",
    "shifted-tokens": "The logits of some tokens are off by the same amount at every position. Their rows of the head "
    "or its bias differ: added tokens that conversion or calibration left out.",
    "off-by-one": "The candidate answers for a neighbouring position. Rows or token ids are shifted by one on one "
    "side: a doubled or missing first token, or a capture of another server.",
    "permuted-vocabulary": "The candidate says consistent things under other ids. Rows of its head are in another "
    "order, or its tokenizer numbers tokens in another way.",
    "wrong-scale": "The candidate's distribution is the reference's at another temperature. A scale on the logits is "
    "missing or doubled: a logit scale, a soft cap, a norm before the head, a scale of the head's weights.",
    "uniform-noise": "The loss is spread evenly over the text and over the window: nothing in particular is broken, "
    "the whole model is too coarse. A finer format, smaller groups, or calibration would help.",
}
"""The patterns by name, with what each usually means."""

_SUFFICIENT = 16
"""Positions below which no share of them is taken for a regularity."""
_STRETCH = 16
"""Tokens in a stretch of source text: long enough that its median does not follow single hard tokens."""


def find_patterns(positions: Positions, tokens: Tokens | None) -> list[Pattern]:
    """Name the faults that the data show. Uniform noise is named only where nothing more particular is."""
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
    # Published 2-bit quantizations keep above 70 %; half is far below all that is used.
    return f"top-1 agreement is {agreement:.1%}" if agreement < 0.5 else None


def _nan_onward(positions: Positions, tokens: Tokens | None) -> str | None:
    sides = (("candidate", positions.candidate_bad), ("reference", positions.reference_bad))
    found = (_onward(side, bad, positions, tokens) for side, bad in sides)
    return "; ".join(evidence for evidence in found if evidence) or None


def _onward(side: str, bad: Booleans, positions: Positions, tokens: Tokens | None) -> str | None:
    windows = np.flatnonzero(bad.any(1))
    first = bad[windows].argmax(1)
    onward = bad[windows].sum(1) == bad.shape[1] - first  # finite before the first one by its definition
    if not windows.size or not onward.all():
        return None
    evidence = f"the {side} is not finite in {windows.size:,} of {len(bad):,} windows, from one position to the end"
    at = positions.token_ids[windows, first]
    if windows.size > 1 and (first == first[0]).all():
        return f"{evidence}, each from position {first[0] + positions.skipped:,}"
    if windows.size > 1 and (at == at[0]).all() and first.any():
        return f"{evidence}, each from token id {at[0]:,}{_quoted(tokens, int(at[0]))}"
    return f"{evidence}, the first (window {windows[0]:,}) from position {first[0] + positions.skipped:,}"


def _broken_stretch(positions: Positions, _: Tokens | None) -> str | None:
    """Compare the medians of stretches of the text, each at its best over the windows that cover it.

    A median follows no single hard token. Text differs in difficulty, so a stretch is held against the hardest tenth
    of the text, not against the middle: it must be ten times worse.
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
    """Return, by text and number of the stretch, its median KL in each window that covers it whole."""
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

    Shifted is what is off by half a nat or more (the odds change by 1.6), eight times as much as is usual over the
    vocabulary, and by three times its own deviation over positions.
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
    """Hold the candidate's choices against the reference's at the neighbouring positions."""
    reference, candidate, valid = positions.reference_argmax, positions.candidate_argmax, positions.valid
    both = valid[:, 1:] & valid[:, :-1]
    if both.sum() < _SUFFICIENT:
        return None
    before = float((candidate[:, 1:] == reference[:, :-1])[both].mean())
    after = float((candidate[:, :-1] == reference[:, 1:])[both].mean())
    match, side = max((before, "before"), (after, "after"))
    # Repetitive text agrees with its neighbours too, but not more than with itself.
    if match < 0.5 or match < positions.top1_agreement + 0.2:
        return None
    return (
        f"the candidate's first choice is the reference's of the position {side} in {match:.1%}, and of the same "
        f"position in {positions.top1_agreement:.1%}"
    )


def _permuted_vocabulary(positions: Positions, tokens: Tokens | None) -> str | None:
    """Find tokens that the candidate consistently calls by another id.

    A token is renamed if the candidate's choice for it is mostly one other token, and that one's is mostly this token
    in turn, in five positions or more: errors of quantization go to common tokens, which have many sources.
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
    if times.max() > 0.9 * times.sum():  # the last ids of a rolled vocabulary come out as the first
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
    """Undo the best temperature on sampled rows: if nearly all KL goes away, that was it.

    Noise leaves the slope near 1 and the KL where it is.
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


def _uniform_noise(positions: Positions) -> str | None:
    """Recognise loss that is of the same size all over.

    In its band it is noticeable (0.05); half of the positions have at least a third of the mean, the worst hundredth
    carries at most a tenth, and no window nor stretch of window is twice the mean.
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
}
