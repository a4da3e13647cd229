"""Evidence: what a diagnosis needs of the logits, taken at compare time and kept beside the Scores.

After the main pass, a second one looks at few rows only: those with the greatest KL, for the most probable tokens of
both sides, and a random sample of the others, for figures over the vocabulary. The kernel stays as it is.
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
"""How many of them."""
_KEPT = 128
"""Tokens kept of each end of the two orders, by contribution and by shift."""
_LEAST_SAMPLED, _MOST_SAMPLED, _SAMPLED_SHARE = 128, 2048, 32
"""Rows in the sample: a 32nd of all positions within these bounds, so that it costs a few per cent of a comparison."""
_BLOCK_ELEMENTS = 1 << 20
"""Logits per side that are looked at together on a CPU: what stays in its caches."""
_DEVICE_ELEMENTS = 1 << 25
_FLOOR = -60.0
"""Log-probabilities below this, −∞ among them, count as this: their weight is nothing."""


def gather_evidence(
    scores: Scores, readers: Sequence[LogitsReader], starts: NDArray[np.int64]
) -> dict[str, NDArray[Any]]:
    """Look at a pair's worst rows, and at a sample.

    Args:
        scores: the finished table.
        readers: of the reference and of the candidate.
        starts: [windows], where each window begins in its text.

    Returns:
        `starts`; `worst` [K, 2] windows and positions; `reference_top_ids`, `reference_top_p`, `candidate_top_ids`,
        `candidate_top_p` [K, 5]; of S sampled rows `sampled` [S, 2], `slope` [S], `kl` [S] and `tempered_kl` [S];
        of M tokens `vocabulary_ids`, `contribution`, `shift` and `shift_deviation` [M]; `shift_scale` [1]. Of the
        rows and the vocabulary see `_Sample`.

    """
    positions = Positions.of(scores)
    vocab_size = scores.about["vocab_size"]
    worst = positions.worst(WORST)
    evidence: dict[str, NDArray[Any]] = {"starts": starts, "worst": _pairs(worst)}
    for side, reader in zip(("reference", "candidate"), readers, strict=True):
        parts = [_top(z) for (z,) in _blocks([reader], worst, vocab_size)]
        evidence[f"{side}_top_ids"] = _joined([ids for ids, _ in parts], np.int32, TOP)
        evidence[f"{side}_top_p"] = _joined([p for _, p in parts], np.float32, TOP)
    sample = _Sample(vocab_size)
    sampled = _random_rows(positions)
    for z_r, z_c in _blocks(readers, sampled, vocab_size):
        sample.add(z_r, z_c)
    return evidence | {"sampled": _pairs(sampled)} | sample.arrays()


class _Sample:
    """Figures of sampled rows and, over them, of the vocabulary.

    With log p, log q the log-probabilities of both sides, x and y the same less their means over the vocabulary:

        slope            = Σ x y / Σ x², the exponent with which p comes closest to q: a temperature of 1 / slope
        tempered_kl      = KL(softmax(slope · log p) ‖ q), what is left of the KL once that is undone
        contribution     = mean over rows of p (log p − log q), nats; over the vocabulary it adds up to the mean KL
        shift            = mean over rows of y − x: by how much the logit of a token is off, nats
        shift_deviation  = standard deviation of the same over rows
        shift_scale      = what is usual for shifts over the vocabulary: 1.4826 · median |shift|
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
        """Return the figures, those of the vocabulary for the tokens at the ends of each order only."""
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


def _random_rows(positions: Positions) -> list[tuple[int, int]]:
    """Pick valid positions at random, always the same ones: a regular step could fall in with the windows' stride."""
    valid = np.flatnonzero(positions.valid)
    count = min(valid.size, _MOST_SAMPLED, max(_LEAST_SAMPLED, positions.kl.size // _SAMPLED_SHARE))
    chosen = np.sort(np.random.default_rng(0).choice(valid, count, replace=False))
    windows, columns = np.unravel_index(chosen, positions.shape)
    return list(zip(windows.tolist(), columns.tolist(), strict=True))


def _blocks(
    readers: Sequence[LogitsReader], where: Sequence[tuple[int, int]], vocab_size: int
) -> Iterator[list[Tensor]]:
    elements = _BLOCK_ELEMENTS if readers[0].device.type == "cpu" else _DEVICE_ELEMENTS
    rows = max(8, elements // vocab_size)  # fewer would read the head's weights too often
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
