"""Evidence: the data from the logits that a diagnosis needs, collected during a comparison and stored with the Scores.

After the main pass, a second one reads only a few rows: those with the greatest KL, for the most probable tokens of
both sides, and a random sample of all valid rows, for figures over the vocabulary. The kernel is not involved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pytest_kld.figures.positions import Positions

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from pytest_kld.captures.capture import LogitsReader
    from pytest_kld.figures.scores import Scores

WORST = 32
"""Positions whose most probable tokens are kept."""
TOP = 5
"""The number of most probable tokens that are kept."""
_KEPT = 128
"""Tokens kept from each end of the two orders, by contribution and by shift."""
_LEAST_SAMPLED, _MOST_SAMPLED, _SAMPLED_SHARE = 128, 2048, 32
"""Rows in the sample: 1/32 of all positions, within these bounds, which costs a few per cent of a comparison."""
_BLOCK_ELEMENTS = 1 << 20
"""Logits per side that are processed at a time on a CPU: they fit into its caches."""
_DEVICE_ELEMENTS = 1 << 25
_FLOOR = -60.0
"""Smaller log-probabilities, including −∞, are raised to this: their weight is negligible."""


def gather_evidence(scores: Scores, readers: Sequence[LogitsReader]) -> dict[str, NDArray[Any]]:
    """Collect evidence from a pair's worst rows and from a sample of its rows.

    Args:
        scores: the finished table, with `starts` [windows], where each window begins in its text, as evidence.
        readers: the readers of the reference and of the candidate, in this order.

    Returns:
        What the table has already; `worst` [K, 2] windows and columns; `reference_top_ids`, `reference_top_p`,
        `candidate_top_ids`, `candidate_top_p` [K, 5]; for S sampled rows `sampled` [S, 2], `slope` [S], `kl` [S] and
        `tempered_kl` [S];
        for M tokens `vocabulary_ids`, `contribution`, `shift` and `shift_deviation` [M]; `shift_scale` [1]. `_Sample`
        defines the figures of rows and vocabulary.

    """
    positions = Positions.of(scores)
    vocab_size = scores.about["vocab_size"]
    worst = positions.worst(WORST)
    evidence: dict[str, NDArray[Any]] = {**scores.evidence, "worst": _pairs(worst)}
    for side, reader in zip(("reference", "candidate"), readers, strict=True):
        parts = [_top(z) for (z,) in _blocks([reader], _placed(worst, scores), vocab_size)]
        evidence[f"{side}_top_ids"] = _joined([ids for ids, _ in parts], np.int32, TOP)
        evidence[f"{side}_top_p"] = _joined([p for _, p in parts], np.float32, TOP)
    sample = _Sample(vocab_size)
    sampled = _random_rows(positions)
    for z_r, z_c in _blocks(readers, _placed(sampled, scores), vocab_size):
        sample.add(z_r, z_c)
    return evidence | {"sampled": _pairs(sampled)} | sample.arrays()


class _Sample:
    """Figures of sampled rows and, averaged over these rows, of the vocabulary.

    With log p, log q the log-probabilities of both sides, x and y the same minus their means over the vocabulary:

        slope            = Σ x y / Σ x², the exponent with which p comes closest to q: a temperature of 1 / slope
        tempered_kl      = KL(softmax(slope · log p) ‖ q), the KL that remains after correcting the temperature
        contribution     = mean over rows of p (log p − log q), nats; its sum over the vocabulary is the mean KL
        shift            = mean over rows of y − x: the offset of a token's logit, nats
        shift_deviation  = standard deviation of the same over rows
        shift_scale      = the typical shift over the vocabulary: 1.4826 · median |shift|
    """

    def __init__(self, vocab_size: int) -> None:
        self._rows = 0
        self._per_row: list[Tensor] = []
        self._sums = np.zeros((3, vocab_size))  # of contributions, shifts, squared shifts

    def add(self, z_r: Tensor, z_c: Tensor) -> None:
        """Add rows [n, V]."""
        log_p, log_q = (z.log_softmax(-1).clamp_(min=_FLOOR) for z in (z_r, z_c))
        x, y = (log - log.mean(-1, keepdim=True) for log in (log_p, log_q))
        slope = (x * y).sum(-1) / x.square().sum(-1).clamp(min=1e-30)
        contribution = log_p.exp().mul_(log_p - log_q)
        log_t = x.mul(slope[:, None]).log_softmax(-1)
        tempered_kl = log_t.exp().mul_(log_t.sub_(log_q)).sum(-1)
        self._per_row.append(torch.stack([slope, contribution.sum(-1), tempered_kl]))
        shift = y.sub_(x)
        sums = torch.stack([contribution.sum(0), shift.sum(0), shift.square_().sum(0)])
        self._sums += sums.double().cpu().numpy()
        self._rows += len(z_r)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the figures; those of the vocabulary only for the tokens at both ends of each order."""
        contribution, shift, square = self._sums / max(self._rows, 1)
        deviation = np.sqrt((square - shift**2).clip(min=0))
        ends = [np.r_[order[:_KEPT], order[-_KEPT:]] for order in (np.argsort(contribution), np.argsort(shift))]
        ids = np.unique(np.concatenate(ends))
        rows = torch.cat(self._per_row, 1).double().cpu().numpy() if self._per_row else np.zeros((3, 0))
        return {
            "slope": rows[0],
            "kl": rows[1],
            "tempered_kl": rows[2],
            "vocabulary_ids": ids.astype(np.int32),
            "contribution": contribution[ids],
            "shift": shift[ids],
            "shift_deviation": deviation[ids],
            "shift_scale": np.array([1.4826 * np.median(np.abs(shift))]),
        }


def _placed(where: Sequence[tuple[int, int]], scores: Scores) -> list[tuple[int, int]]:
    """Return windows and positions of rows that are given by window and column of the table."""
    return [(window, scores.first_position + column) for window, column in where]


def _random_rows(positions: Positions) -> list[tuple[int, int]]:
    """Pick random valid positions with a fixed seed: regular steps could coincide with the windows' stride."""
    valid = np.flatnonzero(positions.valid)
    count = min(valid.size, _MOST_SAMPLED, max(_LEAST_SAMPLED, positions.kl.size // _SAMPLED_SHARE))
    chosen = np.sort(np.random.default_rng(0).choice(valid, count, replace=False))
    windows, columns = np.unravel_index(chosen, positions.shape)
    return list(zip(windows.tolist(), columns.tolist(), strict=True))


def _blocks(
    readers: Sequence[LogitsReader], where: Sequence[tuple[int, int]], vocab_size: int
) -> Iterator[list[Tensor]]:
    elements = _BLOCK_ELEMENTS if readers[0].device.type == "cpu" else _DEVICE_ELEMENTS
    rows = max(8, elements // vocab_size)  # smaller blocks would read the head's weights too often
    for start in range(0, len(where), rows):
        block = where[start : start + rows]
        yield [reader.logits_at(block)[:, :vocab_size].float() for reader in readers]


def _top(z: Tensor) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    p, ids = z.softmax(-1).topk(min(TOP, z.shape[1]), -1)
    return ids.to(torch.int32).cpu().numpy(), p.cpu().numpy()


def _joined(parts: list[NDArray[Any]], dtype: type, width: int) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.empty((0, width), dtype)


def _pairs(where: Sequence[tuple[int, int]]) -> NDArray[np.int32]:
    return np.array(where, np.int32).reshape(-1, 2)
